"""Fork a process for each script that tests start, from one process that has imported what the scripts import.

python tests/helpers/warm_server.py SOCKET PRELOAD

PRELOAD is a name of PRELOADS: what is imported. The server ends with the last of its users: the process at the other
end of its stdin, and those that have sent STAY and keep their connection.

A request is one message of JSON, {"argv", "env", "cwd"}, with three file descriptors: the script's stdin, stdout and
stderr. The answers are messages on the same connection: the process id, and later the return code, as in subprocess.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

# Bytes.
MAX_REQUEST = 1 << 20
STAY = b"stay"


def preload_megabert() -> None:
    """Import what training, fine-tuning and conversion import. None of it starts threads or sets a device up."""
    import megabert.commands.pretrain
    import megabert.convert.deepspeed_checkpoint
    import megabert.convert.from_hf
    import megabert.convert.to_hf
    import megabert.finetune.main
    import megabert.training.loop  # noqa: F401
    from megabert.training.distributed import deepspeed_compat
    from megabert.training.telemetry import provenance

    # DeepSpeed imports them when it makes an engine and a ZeRO optimizer, the latter with torch's compiler.
    importlib.import_module("deepspeed.module_inject.auto_ep_layer")
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    # Every run reads the metadata of all packages.
    versions = provenance.versions()
    provenance.versions = versions.copy
    # Every start compiles and links a small program, to see which operations could be built.
    deepspeed_compat.skip_shm_comm_build()


def preload_transformers() -> None:
    """Import what a user of an exported folder imports; nothing of megabert."""
    import transformers.pipelines
    import transformers.trainer  # noqa: F401

    for model in ("bert", "modernbert"):
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    assert not any(name.startswith("megabert.") for name in sys.modules)


PRELOADS = {"megabert": preload_megabert, "transformers": preload_transformers}


def prepare_to_fork() -> None:
    # The garbage collector of a forked process need not visit, and copy, all these objects.
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, "a fork would lose the other threads"


def serve(path: str) -> None:
    """Answer requests until no user is left. One thread does everything: a fork copies the locks that others hold."""
    users: set[Any] = {0}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server, selectors.DefaultSelector() as selector:
        server.bind(path)
        server.listen(64)
        selector.register(0, selectors.EVENT_READ)
        selector.register(server, selectors.EVENT_READ)
        while users:
            for key, _ in selector.select():
                if key.fileobj in users:
                    selector.unregister(key.fileobj)
                    users.remove(key.fileobj)
                elif key.fileobj is server:
                    connection = server.accept()[0]
                    data, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST, 3)
                    if data == STAY:
                        users.add(connection)
                        selector.register(connection, selectors.EVENT_READ)
                        connection.send(STAY)
                    elif data:
                        start(json.loads(data), descriptors, connection, server, selector)
                else:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    report_end(*key.data)
        os.unlink(path)


def start(
    request: dict[str, Any],
    descriptors: list[int],
    connection: socket.socket,
    server: socket.socket,
    selector: selectors.BaseSelector,
) -> None:
    """Fork a process for the request on this connection."""
    pid = os.fork()
    if pid == 0:
        selector.close()
        server.close()
        connection.close()
        become(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.send(str(pid).encode())
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (connection, pid))


def report_end(connection: socket.socket, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    with connection, contextlib.suppress(BrokenPipeError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Run the script in this forked process, as `python SCRIPT ...` would, and end the process with its exit code."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    import torch

    # torch has read the first variable when it was imported, and transformers the second.
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "HF_MODULES_CACHE" in os.environ:
        for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
            if "HF_MODULES_CACHE" in vars(module):
                module.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]  # type: ignore[attr-defined]
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    code: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(code + "\n")
            code = 1
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a script
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))


if __name__ == "__main__":
    PRELOADS[sys.argv[2]]()
    prepare_to_fork()
    serve(sys.argv[1])
