"""Collectives read back from programs that were compiled here, and from text of other compilers."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from saejax import mesh as mesh_lib
from saejax.mesh import MeshShape
from saejax.plan.hlo import UNNAMED, Collective, Program, Unreadable

SHAPE = MeshShape(2, 4)


def read(fn, *shapes) -> dict[str, tuple]:
    """Collectives of a function of tokens `[16, ...]`, split over the whole mesh."""
    mesh = mesh_lib.make_mesh(SHAPE)
    names = ["tokens"] * len(shapes)
    sharded = mesh_lib.per_device(lambda *x: (fn(*x),), mesh, names, ["tokens"])
    arguments = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=mesh_lib.token_sharding(mesh)) for s in shapes
    ]
    text = jax.jit(sharded).lower(*arguments).compile().as_text()
    rows = Program(text, SHAPE, ("inner", "outer", "one")).collectives()
    return {c.name: (c.kind, c.axis, c.calls, c.bytes) for c in rows}


def named(name, fn):
    def under(x):
        with jax.named_scope(name):
            return fn(x)

    return under


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        # Each device has [2, 8] float32.
        (lambda x: lax.all_gather(x, "latent", tiled=True), ("all-gather", "latent", 256)),
        (lambda x: lax.all_gather(x, "data", tiled=True), ("all-gather", "data", 128)),
        (lambda x: lax.psum(x, "data"), ("all-reduce", "data", 64)),
        (lambda x: lax.psum(x, ("data", "latent")), ("all-reduce", "data, latent", 64)),
        (
            lambda x: lax.psum_scatter(x, "latent", scatter_dimension=1, tiled=True),
            ("reduce-scatter", "latent", 64),
        ),
        (
            lambda x: lax.all_to_all(x, "latent", split_axis=1, concat_axis=0, tiled=True),
            ("all-to-all", "latent", 64),
        ),
    ],
)
def test_kind_axis_and_bytes(fn, expected):
    kind, axis, size = expected
    assert read(named("one", fn), (16, 8)) == {"one": (kind, axis, 1, size)}


def test_loops_multiply_and_scopes_nest():
    def step(x):
        def body(total, _):
            with jax.named_scope("inner"):
                return total + lax.psum(total, "latent"), None

        with jax.named_scope("outer"):
            return lax.scan(body, x, None, length=7)[0]

    assert read(step, (16, 8)) == {"outer inner": ("all-reduce", "latent", 7, 7 * 64)}


def test_the_branch_that_moves_most_counts():
    def step(x):
        def wide(x):
            return lax.psum(jnp.concatenate([x, x]), "latent")[:2]

        branches = [lambda x: x, lambda x: lax.psum(x, "latent"), wide]
        with jax.named_scope("one"):
            return lax.switch(jnp.int32(x.sum() > 0), branches, x)

    assert read(step, (16, 8)) == {"one": ("all-reduce", "latent", 1, 128)}


def test_of_branches_that_move_as_much_the_one_that_calls_most_counts():
    def step(x):
        def halves(x):
            return lax.map(lambda half: lax.psum(half, "latent"), x)

        branches = [lambda x: lax.psum(x, "latent"), halves]
        with jax.named_scope("one"):
            return lax.switch(jnp.int32(x.sum() > 0), branches, x)

    assert read(step, (16, 8)) == {"one": ("all-reduce", "latent", 2, 64)}


def test_what_no_scope_claims_is_unnamed():
    assert list(read(lambda x: lax.psum(x, "data"), (16, 16))) == [UNNAMED]


# As the TPU compiler writes; a backslash joins its longest lines.
TPU = """HloModule jit_step

%region.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0), metadata={op_name="while/body/one/reduce_scatter"}
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[32,8]) -> f32[8,8] {
  %input = f32[32,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[32,8]{1,0:T(8,128)} all-reduce(%input), \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%region.1
  ROOT %slice = f32[8,8]{1,0:T(8,128)} slice(%all-reduce.1), slice={[0:8], [0:8]}
}

%condition (s: (s32[], f32[32,8])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (s.1: (s32[], f32[32,8])) -> (s32[], f32[32,8]) {
  %s.1 = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) parameter(0)
  %x = f32[32,8]{1,0:T(8,128)} get-tuple-element(%s.1), index=1
  %fusion = f32[8,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %gather-start = (f32[8,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%fusion), \
replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="outer/while/inner/all_gather"}
  %gather-done = f32[32,8]{1,0} all-gather-done(%gather-start)
  ROOT %out = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) tuple(%i.1, %gather-done)
}

ENTRY %main (p: f32[32,8]) -> f32[] {
  %p = f32[32,8]{1,0:T(8,128)} parameter(0)
  %while = (s32[]{:T(128)}, f32[32,8]{1,0:T(8,128)}) while(%p), condition=%condition, body=%body
  %norm = f32[]{:T(128)} reduce(%p)
  ROOT %total = f32[]{:T(128)} all-reduce(%norm), \
replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, to_apply=%region.2
}
"""


def test_the_tpu_compilers_ways():
    """A fused reduce-scatter, halves of an asynchronous gather, bare loop limits, named groups."""
    found = Program(TPU, SHAPE, ("one", "inner", "outer")).collectives()
    rows = {c.name: (c.kind, c.axis, c.calls, c.bytes) for c in found}
    assert rows == {
        "one": ("reduce-scatter", "latent", 5, 5 * 1024),
        "outer inner": ("all-gather", "latent", 5, 5 * 1024),
        "scalars": ("all-reduce", "latent", 1, 4),
    }


def test_a_name_the_compiler_dropped_is_inferred_from_what_is_missing():
    text = TPU.replace("while/body/one/reduce_scatter", "")
    one = {"kind": "reduce-scatter", "axis": "latent", "calls": 5}
    expected = [
        Collective(name="two", bytes=4 * 1024, **one),
        Collective(name="one", bytes=5 * 1024, **one),
    ]
    program = Program(text, SHAPE, ("one", "inner", "outer"))
    assert UNNAMED in {c.name for c in program.collectives()}
    names = {c.name for c in program.collectives(expected)}
    assert names == {"one", "outer inner", "scalars"}


def test_a_loop_whose_trips_are_not_known():
    text = TPU.replace("constant(5)", "parameter(1)")
    with pytest.raises(Unreadable, match="the loop while has collectives, and its trips are not"):
        Program(text, SHAPE, ())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ENTRY %main", "%main", "no ENTRY"),
        ("calls=%all-reduce-scatter.1", "calls=%elsewhere", "calls elsewhere, which it does not"),
        ("body=%body", "body=%elsewhere", "calls elsewhere, which it does not"),
        ("condition=%condition", "condition=%elsewhere", "calls elsewhere, which it does not"),
        ("all-gather-start(%fusion)", "all-gather-start(%other)", "gather-start are not known"),
        # A way to run a computation that the reader does not know: found by counting.
        ("kind=kCustom, calls=", "kind=kCustom, runs=", "3 collectives, of which 2 were read"),
    ],
)
def test_what_cannot_be_followed_is_an_error(old, new, message):
    assert TPU.count(old) == 1
    with pytest.raises(Unreadable, match=message):
        Program(TPU.replace(old, new), SHAPE, ())


ASYNC = """HloModule jit_step

%wrapped (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %exchange = f32[4,8]{1,0} all-to-all(%a), replica_groups=[2,4]<=[8], dimensions={0}
}

%other (b: f32[4,8]) -> f32[4,8] {
  %b = f32[4,8]{1,0} parameter(0)
  ROOT %sum = f32[4,8]{1,0} all-reduce(%b), replica_groups=[2,4]<=[8], to_apply=%add
}

%scan (c: f32[4,8]) -> f32[4,8] {
  ROOT %c = f32[4,8]{1,0} parameter(0)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %s = ((f32[4,8]{1,0}), f32[4,8]{1,0}, u32[]) async-start(%p), calls=%wrapped
  %u = ((f32[4,8]{1,0}), f32[4,8]{1,0}, u32[]) async-update(%s), calls=%wrapped
  %d = f32[4,8]{1,0} async-done(%u), calls=%wrapped
  %r-start = f32[4,8]{1,0} all-reduce-start(%d), replica_groups=[2,4]<=[8], to_apply=%add, \
metadata={op_name="says all-gather(x) and calls=%nothing"}
  %r = f32[4,8]{1,0} all-reduce-done(%r-start)
  ROOT %t = f32[4,8]{1,0} custom-call(%r), called_computations={%scan, %other}
}
"""


def test_halves_of_a_pair_are_one_and_every_called_computation_is_followed():
    found = Program(ASYNC, SHAPE, ()).collectives()
    rows = {c.kind: (c.axis, c.calls, c.bytes) for c in found}
    assert rows == {"all-to-all": ("latent", 1, 128), "all-reduce": ("latent", 2, 256)}


def test_a_condition_runs_once_more_than_its_body():
    text = TPU.replace(
        "  %i = s32[]",
        "  %z = f32[] convert(%limit)\n"
        "  %y = f32[] all-reduce(%z), replica_groups=[1,8]<=[8], to_apply=%region.1\n"
        "  %i = s32[]",
    )
    found = Program(text, SHAPE, ("one", "inner", "outer")).collectives()
    assert ("data, latent", 6, 24) in {(c.axis, c.calls, c.bytes) for c in found}
