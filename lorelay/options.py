"""The command line of `lorelay`; each flag of `serve` stands for a setting in `shared.settings`.

The values of flags stay strings here. The settings parse and check these strings, like values of environment
variables.
"""

import argparse
import importlib.metadata
from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.settings import ENV_PREFIX, ApiSettings, ServeSettings, Settings, WorkerSettings


class Flag(NamedTuple):
    """A flag, the setting that it sets, and its help text."""

    owner: type[Settings]
    field: str
    help: str
    metavar: str | None = None
    """Name of the value in `-h`; None if the flag takes no value."""
    default: str | None = None
    """Description of the default in `-h`; None shows the setting's default value."""

    @property
    def name(self) -> str:
        return "--" + self.field.replace("_", "-")

    @property
    def variable(self) -> str:
        return f"{ENV_PREFIX}{self.field.upper()}"

    def describe(self) -> str:
        """Returns the help text with environment variable and default."""
        shown = self.default or (self.owner.model_fields[self.field].default if self.metavar else "off")
        return f"{self.help} [{self.variable}; default: {shown}]".replace("%", "%%")


REDIS_URL_HELP = "redis://, rediss:// (TLS) or unix:// URL, with user and password if need be"
STATE_DIR_HELP = "folder of the embedded server: its data, log and socket"

SERVE_FLAGS: dict[str, tuple[Flag, ...]] = {
    "what to serve": (
        Flag(
            WorkerSettings,
            "adapters",
            "LoRA adapters: name=path, any number of them, or one bare path that is named by its folder; "
            "a path is a local folder or a Hugging Face id; @file names a file with one name=path a line",
            "NAME=PATH",
            "none",
        ),
        Flag(
            WorkerSettings,
            "model_name",
            "what clients call the base model",
            "NAME",
            "MODEL as given, for a folder its name",
        ),
        Flag(WorkerSettings, "revision", "branch, tag or commit of a Hugging Face model", "REV", "main"),
        Flag(WorkerSettings, "trust_remote_code", "run Python code that comes with the model"),
    ),
    "where to listen": (
        Flag(ServeSettings, "server_name", "address to listen on", "HOST"),
        Flag(ServeSettings, "server_port", "port to listen on", "PORT"),
        Flag(
            ApiSettings,
            "api_keys",
            "keys that clients may use as bearer tokens, as name:key or key; better given by the variable "
            "or the file, since every user of this machine can read command lines",
            "KEY",
            "no key needed",
        ),
        Flag(
            ApiSettings,
            "api_keys_file",
            "file with further keys, which is read again when it changes",
            "FILE",
            "none",
        ),
    ),
    "the queue": (
        Flag(ServeSettings, "redis_url", f"Redis or Valkey: {REDIS_URL_HELP}", "URL", "an embedded server"),
        Flag(ServeSettings, "state_dir", STATE_DIR_HELP, "DIR", "~/.local/state/lorelay"),
    ),
    "workers": (
        Flag(
            ServeSettings,
            "workers",
            "worker processes, each with the whole model on its own GPU; without GPUs they share the cores",
            "N",
        ),
        Flag(WorkerSettings, "device", "auto, cpu, cuda or cuda:N; auto takes a GPU if there is one", "DEV"),
        Flag(
            WorkerSettings,
            "dtype",
            "number type of the weights: auto (the model's own), bfloat16, float16, float32, float64",
            "TYPE",
        ),
        Flag(
            WorkerSettings,
            "session_len",
            "context length in tokens, prompt and answer together",
            "N",
            "the model's own",
        ),
        Flag(WorkerSettings, "max_batch_size", "maximum number of sequences in a worker's batch", "N"),
        Flag(
            WorkerSettings,
            "cache_max_entry_count",
            "share of the free device memory that the KV cache may take, over 0 up to 1",
            "SHARE",
        ),
        Flag(
            WorkerSettings,
            "max_resident_adapters",
            "maximum number of adapters in the device's memory",
            "N",
            "as many as a batch can hold, in a tenth of the free memory",
        ),
        Flag(
            WorkerSettings,
            "max_cached_adapter_bytes",
            "host memory that caches adapters which are not on the device; all others are read from disk",
            "BYTES",
            "a tenth of the memory that is free at the start",
        ),
        Flag(
            WorkerSettings,
            "max_wait_s",
            "maximum time that a request waits before its adapter may evict another one from the device",
            "SECONDS",
        ),
    ),
}

ALL_SERVE_FLAGS = tuple(flag for flags in SERVE_FLAGS.values() for flag in flags)
_LISTS = {"adapters", "api_keys"}


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser, which puts the name of the subcommand into the argument `command`."""
    parser = argparse.ArgumentParser(
        prog="lorelay", description="An OpenAI-compatible server for one base model and many LoRA adapters."
    )
    parser.add_argument("--version", action="version", version=f"lorelay {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    status = commands.add_parser(
        "status", help="show workers, models and queues", description="Show workers, models and queues."
    )
    _add_server_options(status)
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument(
        "--here",
        action="store_true",
        help="exit with code 1 unless a live worker runs on this host (for health checks)",
    )
    dashboard = commands.add_parser(
        "dashboard",
        help="run rq-dashboard on the queues",
        description="Run rq-dashboard on the queues, with its delete buttons disabled.",
    )
    _add_server_options(dashboard)
    dashboard.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="address to listen on [default: %(default)s]"
    )
    dashboard.add_argument(
        "--port", default=9181, type=int, metavar="PORT", help="port to listen on [default: %(default)s]"
    )
    return parser


def given_values(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the values given on the command line, by the name of their setting."""
    names = ["model", *(flag.field for flag in ALL_SERVE_FLAGS)]
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def as_variables(values: Mapping[str, Any]) -> dict[str, str]:
    """Converts settings to environment variables."""
    return {
        f"{ENV_PREFIX}{name.upper()}": " ".join(value) if isinstance(value, list) else str(value)
        for name, value in values.items()
    }


def flag_of(variable: str | None) -> str | None:
    """Returns the flag that sets the same setting as an environment variable, or None."""
    if variable == f"{ENV_PREFIX}MODEL":
        return "MODEL"
    return next((flag.name for flag in ALL_SERVE_FLAGS if flag.variable == variable), None)


def version() -> str:
    """Returns the installed version."""
    try:
        return importlib.metadata.version("lorelay")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model: queue, workers and HTTP API on this machine",
        description="Serve a model and its adapters: an embedded queue server (unless --redis-url names "
        "one), workers and the HTTP API. A process that dies is restarted. Ctrl-C or SIGTERM lets running "
        "requests finish; a second Ctrl-C shortens their time. Every flag except --ssl has an environment "
        "variable, named in brackets; the flag takes precedence.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder or Hugging Face id of the base model [LORELAY_MODEL]",
    )
    for title, flags in SERVE_FLAGS.items():
        group = serve.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag)
        if title == "where to listen":
            group.add_argument(
                "--ssl",
                action="store_true",
                help="serve HTTPS with the files that SSL_KEYFILE and SSL_CERTFILE name",
            )


def _add_flag(group: Any, flag: Flag) -> None:
    if flag.metavar is None:
        group.add_argument(flag.name, action="store_const", const="true", help=flag.describe())
    elif flag.field in _LISTS:
        group.add_argument(flag.name, nargs="+", action="extend", metavar=flag.metavar, help=flag.describe())
    else:
        group.add_argument(flag.name, metavar=flag.metavar, help=flag.describe())


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--redis-url", metavar="URL", help=f"{REDIS_URL_HELP} [LORELAY_REDIS_URL]")
    server.add_argument("--state-dir", metavar="DIR", help=f"{STATE_DIR_HELP} [LORELAY_STATE_DIR]")
