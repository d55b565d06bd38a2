"""Triton's interpreter for tests. It is chosen by an environment variable before kernels are defined, so that it needs
a process of its own: one for all tests, which forks for every call, so that none sees what another has changed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Interpreter:
    """The process; started with the first call."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, function: str, *arguments: Any) -> Any:
        """``module:function`` of tests.kernels, of arguments that JSON can hold; so is what it returns."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.kernels.interpreter"], cwd=ROOT,
                env=os.environ | {"TRITON_INTERPRET": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps([function, arguments]) + "\n")
            stdin.flush()
            line = stdout.readline()
            assert line, "the process with Triton's interpreter ended; its last words are on stderr"
            answer = json.loads(line)
        except BaseException:  # a test's time is up, say: the next one must not be given this answer
            self.close()
            raise
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with the child that has not answered
            self.process.wait()
            self.process = None


def _call(function: str, arguments: list[Any]) -> dict[str, Any]:
    module, name = function.split(":")
    try:
        return {"result": getattr(importlib.import_module(f"tests.kernels.{module}"), name)(*arguments)}
    except Exception:
        return {"error": traceback.format_exc()[-3000:]}


def hasten() -> None:
    """In a process with the interpreter: a third of its time goes into exchanging all of the language's functions anew
    for every device function that a kernel calls, where the kernel's start has done it."""
    from triton import language
    from triton.runtime import interpreter

    exchange = interpreter._patch_lang

    def once(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value is language or value is language.core]
        if seen and not any(language.core.is_builtin(module.arange) for module in seen):
            return interpreter._LangPatchScope()  # nothing to exchange, or to give back
        return exchange(fn)

    interpreter._patch_lang = once


def serve() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what others print
    import torch
    import torch._dynamo  # takes long to import, and some of the calls need it

    import dnsp.kernels.proof_run  # and with it all kernels  # noqa: F401

    torch.set_num_threads(1)
    hasten()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.write(out, (json.dumps(_call(*json.loads(line))) + "\n").encode())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            os.write(out, (json.dumps({"error": f"ended with status {status}"}) + "\n").encode())


if __name__ == "__main__":
    serve()
