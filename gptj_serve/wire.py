"""Messages on a wire: msgpack of the structs in `types` and `steps`; whatever arrives is decoded or refused."""

from typing import Any, Generic, TypeVar

import msgspec

from gptj_serve.errors import WireError

Message = TypeVar("Message")


class WireDecoder(Generic[Message]):
    """Decodes messages of one type, checking every type and bound."""

    def __init__(self, type_: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(type_)
        self._name = getattr(type_, "__name__", str(type_))

    def decode(self, data: bytes | bytearray | memoryview) -> Message:
        """Raises `WireError` for anything but one whole message of the type."""
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"{len(data)} bytes that are no {self._name}: {error}") from None
