"""The two operations' XLA paths, one after the other."""

from pallas_kernels.row_update import xla as rows
from pallas_kernels.weight_grads import xla as grads
from pallas_kernels.weight_grads_update.composed import composed

weight_grads_update = composed(grads.weight_grads, rows.row_update)
