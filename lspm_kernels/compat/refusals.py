"""How an option of another library is refused that our kernels do not carry."""

from torch import Tensor


def refuse(op: str, name: str, value: object, wanted: bool | None, why: str) -> None:
    """Raises NotImplementedError unless value is what is wanted."""
    if value is wanted or (wanted is not None and not isinstance(value, Tensor) and value == wanted):
        return
    got = "a tensor" if isinstance(value, Tensor) else repr(value)
    raise NotImplementedError(f"{op}: {name} must be {wanted}, as {why}, got {got}")
