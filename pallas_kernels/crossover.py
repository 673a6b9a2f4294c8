"""Where a dense code is cheaper than a sparse one.

A gathered row costs its bytes over the memory's bandwidth; a dense product multiplies F / BW rows
in that time. So a dense code pays up to n = k * F / BW latents of which k are kept.
"""

from pallas_kernels import dispatch

# F / BW by part of the device's kind, the more special one first. Hopper: of the rates measured on
# an H200, 790 TFLOP/s of bfloat16 products against copies at 4.3 TB/s; TPU v5e, v5p: of public
# data sheets, not measured. Those of v6e and 7x would say 560 and 310; until they are measured,
# these have the same as all others, since a dense code of so many latents takes much memory.
_OF_KIND = {"tpu": {"v5 lite": 240, "v5e": 240, "v5": 166}, "gpu": {"H100": 184, "H200": 184}}
_OF_PLATFORM = {"cpu": 24}  # measured on 2 cores
_ELSEWHERE = 184


def dense_below(platform: str | None = None, device_kind: str = "") -> int:
    """Latents per kept latent up to which a dense code is cheaper than a sparse one.

    Args:
      platform: "cpu", "gpu" or "tpu"; None is the target in force, its kind included.
      device_kind: as JAX names the device, or a part of that, such as "v5p"; "" if unknown.

    Raises:
      ValueError: there is no such platform.
    """
    if platform is None:
        here = dispatch.current_target()
        platform, device_kind = here.platform, here.device_kind
    platform = dispatch.platform_of("dense_below", platform)
    for part, ratio in _OF_KIND.get(platform, {}).items():
        if part in device_kind:
            return ratio
    return _OF_PLATFORM.get(platform, _ELSEWHERE)


def code_layout(k: int, n: int, shards: int = 1, ratio: int | None = None) -> str:
    """ "dense", "pairs" or "rows": the layout of a code that suits its size; told to a listener.

    Args:
      k: latents kept per token over all shards.
      n: latents over all shards.
      shards: latent shards; a shard of several keeps few of the slots that it offers.
      ratio: see `dense_below`; None is that of the target in force.
    """
    ratio = dense_below() if ratio is None else ratio
    dense = n <= ratio * k
    layout = "dense" if dense else "pairs" if shards > 1 else "rows"
    over = f" over {shards} shards" if shards > 1 else ""
    dispatch.tell(
        f"codes: {layout}, because n = {n}{over} {'<=' if dense else '>'} {ratio} k, k = {k}"
    )
    return layout
