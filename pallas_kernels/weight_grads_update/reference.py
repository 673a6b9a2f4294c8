"""The two operations' plain definitions, one after the other."""

from pallas_kernels.row_update import reference as rows
from pallas_kernels.weight_grads import reference as grads
from pallas_kernels.weight_grads_update.composed import composed

weight_grads_update = composed(grads.weight_grads, rows.row_update)
