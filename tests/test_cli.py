"""What the commands share: exit codes, one-line errors, and advice for when memory runs out."""

import pytest
import torch

from unept import cli


def test_commands_for_one_process_refuse_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        cli.refuse_several_processes()


def test_memory_errors_end_a_command_with_one_line(monkeypatch, capsys):
    def command():
        with cli.out_of_memory("with 4 images"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(SystemExit) as end:
        cli.run(command)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: out of memory with 4 images\n"


def test_other_runtime_errors_stay():
    with pytest.raises(RuntimeError, match="a bug"), cli.out_of_memory(""):
        raise RuntimeError("a bug")


def test_bugs_keep_their_traceback():
    def bug() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cli.run(bug)


def test_absent_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="use --device cpu"):
        cli.choose_device("cuda")
