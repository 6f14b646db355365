"""The exceptions of Lorelay.

LorelayError
├── InvalidRequest
│   ├── UnsupportedParameter
│   └── ContextLengthExceeded
├── InvalidApiKey
├── ModelNotFound
├── NotServedYet
├── RequestNotFound
├── RequestTooLarge
├── UnsupportedMediaType
├── HeadersTooLarge
├── RequestTimeout
├── ServerBusy
├── QueueFull
├── QueueTimeout
│   └── NoWorker
├── QueueUnavailable
│   └── QueueOutOfMemory
├── AdapterError
├── AdapterVersionGone
├── GenerationFailed
│   └── GenerationStopped
├── GenerationTimeout
├── ServerDraining
└── ConfigurationError
    └── RegistryConflict

The docstring of a class is its default message to clients. `api.errors` maps each class to an HTTP status.
"""

from shared.messages import ErrorInfo


class LorelayError(Exception):
    """An internal error."""

    code = "internal_error"
    param: str | None = None

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        self.message = message or str(type(self).__doc__).splitlines()[0]
        if param is not None:
            self.param = param
        super().__init__(self.message)

    def to_info(self) -> ErrorInfo:
        """Returns the error in the form that a `StreamEvent` carries."""
        return ErrorInfo(code=self.code, message=self.message, param=self.param)


class InvalidRequest(LorelayError):
    """The request is not valid."""

    code = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A parameter of the request is not served here."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the requested tokens together exceed the model's context length."""

    code = "context_length_exceeded"
    param = "messages"


class InvalidApiKey(LorelayError):
    """Incorrect API key provided."""

    code = "invalid_api_key"


class ModelNotFound(LorelayError):
    """The model does not exist."""

    code = "model_not_found"
    param = "model"


class NotServedYet(LorelayError):
    """No worker has registered this model yet; try again later."""

    code = "not_served_yet"
    param = "model"


class RequestNotFound(LorelayError):
    """There is no such request, or it belongs to another API key."""

    code = "request_not_found"


class RequestTooLarge(LorelayError):
    """The request body is too large."""

    code = "request_too_large"


class UnsupportedMediaType(LorelayError):
    """The request body is not declared as JSON."""

    code = "unsupported_media_type"
    param = "Content-Type"


class HeadersTooLarge(LorelayError):
    """The request's line and headers are larger than 64 KiB."""

    code = "headers_too_large"


class RequestTimeout(LorelayError):
    """The request did not arrive in time; send it again."""

    code = "request_timeout"


class ServerBusy(LorelayError):
    """Too many connections or request bodies are open; try again later."""

    code = "server_busy"


class QueueFull(LorelayError):
    """The queue is full; try again later."""

    code = "queue_full"

    def __init__(
        self, message: str | None = None, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class QueueTimeout(LorelayError):
    """The request waited longer than the queue time limit."""

    code = "queue_timeout"


class NoWorker(QueueTimeout):
    """No worker serves this model at the moment."""

    code = "no_worker"


class QueueUnavailable(LorelayError):
    """The queue is unavailable; try again later."""

    code = "queue_unavailable"


class QueueOutOfMemory(QueueUnavailable):
    """The queue's server is out of memory; try again later."""

    code = "queue_out_of_memory"


class AdapterError(LorelayError):
    """The adapter can't be served."""

    code = "adapter_error"


class AdapterVersionGone(LorelayError):
    """The weights for which the request was accepted were replaced or removed; send the request again."""

    code = "adapter_version_gone"


class GenerationFailed(LorelayError):
    """The generation failed."""

    code = "generation_failed"


class GenerationStopped(GenerationFailed):
    """The generation was stopped by an operator."""

    code = "generation_stopped"


class GenerationTimeout(LorelayError):
    """The generation took longer than the generation limit."""

    code = "generation_timeout"


class ServerDraining(LorelayError):
    """The server is shutting down; try again."""

    code = "server_draining"


class ConfigurationError(LorelayError):
    """The configuration is not valid."""

    code = "configuration_error"


class RegistryConflict(ConfigurationError):
    """A model name is registered with another version."""

    code = "registry_conflict"


def _subclasses(cls: type[LorelayError]) -> list[type[LorelayError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _subclasses(child))]


ERRORS_BY_CODE = {cls.code: cls for cls in _subclasses(LorelayError)}


def from_info(info: ErrorInfo) -> LorelayError:
    """Returns the exception with the code of `info`; a plain `LorelayError` if the code is unknown."""
    return ERRORS_BY_CODE.get(info.code, LorelayError)(info.message, param=info.param)
