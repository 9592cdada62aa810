"""One job on several processes, on gloo: started by torchrun, and, where that changes nothing, forked."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.checkpoints import TARGETS, content, random_tensors, read_weights, tree, write_checkpoint
from support.forked import BATCH_BYTES, Ended, Forked
from support.launching import environment, free_port, together, torchrun
from support.moments import assert_nothing_half

from svdconvert import JobError, calibrate, convert
from svdconvert.calibration.knowledge import Calibration
from svdconvert.errors import InputError
from svdconvert.jobs.journal import journals, read_journal
from svdconvert.jobs.output import OutputFolder
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.jobs.shard_writer import ShardWriter
from svdconvert.machine.processes import Group
from svdconvert.planning.partition import matrix_cost, split, split_steps, step_cost
from svdconvert.planning.steps import Step
from svdconvert.tensors import TensorInfo

# The command line, in a process that kills itself with SIGKILL at its fifth pwrite.
VICTIM = r"""
import os, signal, sys
from svdconvert.cli import app
from svdconvert.jobs import shard_writer
shard_writer.BATCH_BYTES = 1
if os.environ["RANK"] == "1":
    real, seen = os.pwrite, []
    def dying(*args, **kwargs):
        seen.append(args)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    os.pwrite = dying
app.main(sys.argv[1:])
"""

# The library, as a program uses it.
PROGRAM = r"""
import sys
from svdconvert import convert, densify
from svdconvert.machine import processes
group = processes.join()
report = convert(sys.argv[1], sys.argv[2], rank=16, device="cpu", check=False)
outcome = densify(sys.argv[2], sys.argv[3], device="cpu", check=False)
import os
assert all(os.path.exists(folder + "/config.json") for folder in sys.argv[2:4])
print(f"{group.rank} of {group.size}: {len(report.matrices)} {len(outcome.record['timing'])}", flush=True)
processes.leave()
assert processes.current().size == 1
"""


def sentences(err: str) -> list[str]:
    """What the tool itself said on standard error."""
    return [line for line in err.splitlines() if line.startswith("Error:")]


def statuses(done: Sequence[Ended]) -> list[int]:
    return [ended.status for ended in done]


def printed(done: Sequence[Ended]) -> str:
    return "".join(ended.out for ended in done)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", shards=2)


def command(model: Path, out: Path, *options: object) -> list[object]:
    return [model, "--rank", 16, "--device", "cpu", "--no-check", "--out", out, *options]


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes, in one weight file."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    convert(model, folder, rank=16, device="cpu", check=False)
    return folder


@pytest.fixture(scope="module")
def in_many_files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes, in six weight files."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    convert(model, folder, rank=16, device="cpu", check=False, max_shard_size=30_000)
    assert len(list(folder.glob("*.safetensors"))) == 6
    return folder


class TestSplit:
    @given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 6))
    def test_a_partition_near_the_best(self, costs: list[float], parts: int) -> None:
        things = list(enumerate(costs))
        found = split(things, parts, lambda thing: thing[1])
        assert len(found) == parts
        assert sorted(thing for part in found for thing in part) == things
        assert all(part == sorted(part) for part in found)
        longest = max(sum(cost for _, cost in part) for part in found)
        # Graham's bound for any list schedule: the mean, and one more thing on top of it.
        assert longest <= sum(costs) / parts + max(costs, default=0) * (1 - 1 / parts) + 1e-6

    @given(st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=2), max_size=20), st.integers(2, 4))
    def test_whole_files(self, files: list[set[int]], parts: int) -> None:
        steps = [
            Step("copy", str(i), tuple(TensorInfo(f"t{i}.{f}", "F16", (8, 8), str(f), 0) for f in sorted(found)), ())
            for i, found in enumerate(files)
        ]
        split_up = split_steps(steps, parts, whole_files=True)
        assert sorted((s.key for part in split_up for s in part), key=int) == [s.key for s in steps]
        for part in split_up:
            assert [int(step.key) for step in part] == sorted(int(step.key) for step in part)
            others = [step for other in split_up if other is not part for step in other]
            assert not {f for s in part for f in s.files} & {f for s in others for f in s.files}

    def test_a_matrix_costs_more_than_its_copy(self) -> None:
        info = TensorInfo("w", "F16", (8192, 2048), "f", 0)
        assert step_cost(Step("factorize", "w", (info,), ())) == matrix_cost((8192, 2048)) == matrix_cost((2048, 8192))
        assert step_cost(Step("factorize", "w", (info,), ())) > 5 * step_cost(Step("copy", "w", (info,), (info,)))


class TestSameBytes:
    def test_two_and_one_weight_file(self, model: Path, reference: Path, tmp_path: Path) -> None:
        done = torchrun(2, "-m", "svdconvert", *command(model, tmp_path / "out"))
        assert done.code == 0, done
        assert tree(tmp_path / "out") == tree(reference)
        assert done.out.count("written to") == 1
        timing = json.loads((tmp_path / "out" / "svdconvert.json").read_text())["timing"]
        assert [list(stages) for stages in timing] == [["prepare", "read", "solve", "write"]] * 2
        assert all(stages["solve"]["wall_seconds"] > 0 for stages in timing), "both have solved something"

    def test_three_and_many_weight_files(
        self, launcher: Forked, model: Path, in_many_files: Path, tmp_path: Path
    ) -> None:
        options = ["--max-shard-size", "30KB", "--workers", 2]
        done = together(launcher, 3, *command(model, tmp_path / "out", *options))
        assert statuses(done) == [0, 0, 0], done
        assert tree(tmp_path / "out") == tree(in_many_files)
        assert printed(done).count("wrote model-") == 6
        again = together(launcher, 2, *command(model, tmp_path / "out", *options))
        assert statuses(again) == [0, 0], again
        assert printed(again).count("already holds this result") == 1

    def test_from_a_program_and_densify(self, launcher: Forked, model: Path, reference: Path, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM)
        done = together(launcher, 2, model, tmp_path / "out", tmp_path / "dense", program=str(program))
        assert statuses(done) == [0, 0], done
        assert printed(done).splitlines() == [f"{rank} of 2: {len(TARGETS)} 2" for rank in range(2)]
        assert tree(tmp_path / "out") == tree(reference)
        from svdconvert import densify

        densify(reference, tmp_path / "expected", device="cpu", check=False)
        assert weights_bytes(tmp_path / "dense") == weights_bytes(tmp_path / "expected")

    def test_other_commands_run_once(self, launcher: Forked, model: Path) -> None:
        done = together(launcher, 2, "plan", model, "--rank", 16)
        assert statuses(done) == [0, 0], done
        assert printed(done).count("peak memory of the conversion") == 1


def weights_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


class TestLostProcess:
    @pytest.mark.parametrize(
        ("victim", "call", "at", "go_on"),
        [
            (1, "pwrite", 7, 1),
            pytest.param(0, "pwrite", 12, 3, marks=pytest.mark.slow),
            pytest.param(1, "fsync", 6, 2, marks=pytest.mark.slow),
            (0, "replace", 6, 1),
        ],
    )
    def test_the_same_command_goes_on(
        self,
        victim: int,
        call: str,
        at: int,
        go_on: int,
        launcher: Forked,
        model: Path,
        in_many_files: Path,
        tmp_path: Path,
    ) -> None:
        """With any number of processes, to the same bytes. The last case dies while the files get their names."""
        out = tmp_path / "out"
        options = command(model, out, "--max-shard-size", "30KB")
        lost = together(launcher, 2, *options, victim=victim, dies=(call, at), constants={BATCH_BYTES: 1})
        assert lost[0].status == -signal.SIGKILL, lost
        assert not (out / "config.json").exists()
        for path in out.glob("*.safetensors"):
            assert content(path) == content(in_many_files / path.name)
        recorded = [entry for path in journals(out / JOB_FOLDER) for entry in read_journal(path)]
        assert recorded
        # where the other process was slow, nothing but copies may be done, of which nothing is said
        solved = sum(bool(entry["report"]) for entry in recorded)
        if go_on == 1:
            done = launcher.run(*options)
            assert (done.status, done.err) == (0, "")
            told = (f"{solved} matrices were done by an earlier run", f"did of {solved} matrices is used again")
            assert any(words in done.out for words in told) == bool(solved)
        else:
            again = together(launcher, go_on, *options)
            assert statuses(again) == [0] * go_on, again
        assert tree(out) == tree(in_many_files)

    def test_without_a_launcher_that_ends_the_others(self, model: Path, reference: Path, tmp_path: Path) -> None:
        """The survivor notices by itself, says so once, and keeps what it has done."""
        out, script = tmp_path / "out", tmp_path / "victim.py"
        script.write_text(VICTIM)
        port = str(free_port())
        started = []
        for rank in range(2):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            line = [sys.executable, script, *command(model, out)]
            started.append(
                subprocess.Popen(
                    list(map(str, line)),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment() | variables,
                )
            )
        outputs = [process.communicate(timeout=900) for process in started]
        assert started[1].returncode == -signal.SIGKILL
        assert started[0].returncode == 1, outputs
        assert sentences(outputs[0][1]) == [
            "Error: another process of this job has ended; run the same command to continue"
        ]
        assert "Traceback" not in outputs[0][1]
        convert(model, out, rank=16, device="cpu", check=False)
        assert tree(out) == tree(reference)

    @pytest.mark.parametrize("delay", [0.0, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (1.0, 3.0))])
    def test_ctrl_c_under_torchrun(self, delay: float, model: Path, reference: Path, tmp_path: Path) -> None:
        """A terminal sends it to all; the tool says one sentence, and what torchrun itself says is torchrun's."""
        out = tmp_path / "out"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        line += ["--log-dir", tmp_path / "logs"]
        with subprocess.Popen(
            [*map(str, line), "-m", "svdconvert", *map(str, command(model, out))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
            # As from a terminal, also where the process that runs the tests ignores it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            while not (out / JOB_FOLDER).exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)
            err = process.communicate(timeout=900)[1]
        said = sentences(err)
        if said:
            assert said == ["Error: the job was interrupted; run the same command to continue"], err
            assert process.returncode == 1
        else:  # through by then, or ended by torchrun, which may end the others as soon as one process has left
            assert_nothing_half(out, reference)
        assert not re.search(r'File ".*/svdconvert/', err), err
        convert(model, out, rank=16, device="cpu", check=False)
        assert tree(out) == tree(reference)


class TestErrors:
    def test_one_process_fails(self, launcher: Forked, tmp_path: Path) -> None:
        """A bad tensor is in one process's share: it says which, and nobody else says anything."""
        tensors = random_tensors()
        tensors["gpt_neox.layers.1.attention.dense.weight"][3, 4] = float("nan")
        bad = write_checkpoint(tmp_path / "bad", tensors)
        done = together(launcher, 3, *command(bad, tmp_path / "out"))
        assert all(statuses(done)), done
        err = "".join(ended.err for ended in done)
        (sentence,) = sentences(err)
        assert "gpt_neox.layers.1.attention.dense.weight cannot be converted: it has NaN" in sentence
        assert "svdconvert/" not in err, "no traceback of ours"

    @pytest.mark.parametrize(
        ("options", "expected"),
        [(["--rank", "100"], "rank 100"), (["--rank", "16", "--bad"], "No such option")],
    )
    def test_all_processes_fail_alike(
        self, options: list[str], expected: str, launcher: Forked, model: Path, tmp_path: Path
    ) -> None:
        done = together(launcher, 2, model, *options, "--device", "cpu", "--out", tmp_path / "out")
        assert all(statuses(done)), done
        (sentence,) = sentences("".join(ended.err for ended in done))
        assert expected in sentence
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["호랑이", "tiger", "옛날", "mountain", "살았다", "0123"]
    path.write_text("\n\n".join(" ".join(words[(7 * i + 3 * j * j) % 6] for j in range(12)) for i in range(60)))
    return path


def text_options(text: Path) -> list[object]:
    return ["--calib", text, "--calib-samples", 7, "--calib-length", 32, "--calib-batch-size", 2]


class TestCalibration:
    @pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
    def test_statistics_are_those_of_one_process(
        self, count: int, launcher: Forked, model: Path, text: Path, tmp_path: Path
    ) -> None:
        """Seven sequences for two or three processes; sampled labels too are the same ones."""
        methods = ["kfac", "asvd", "fwsvd"]
        chosen = Calibration(str(text), samples=7, length=32, batch_size=2, labels="sampled")
        perplexity = calibrate(model, chosen, tmp_path / "one", methods=methods, device="cpu")
        line = ["calibrate", model, "--out", tmp_path / "many", "--device", "cpu", "--labels", "sampled"]
        for method in methods:
            line += ["--method", method]
        done = together(launcher, count, *line, *text_options(text))
        assert statuses(done) == [0] * count, done
        one, many = (json.loads((tmp_path / name / "stats.json").read_text()) for name in ("one", "many"))
        assert many["key"] == one["key"]
        assert many["loss"]["nll"] == pytest.approx(one["loss"]["nll"], rel=1e-6)
        assert many["loss"]["tokens"] == one["loss"]["tokens"] == 7 * 31
        assert f"{perplexity:,.2f}" in printed(done)
        assert many["blocks"] == one["blocks"], "the counts of tokens and samples"
        files = sorted((tmp_path / "one").glob("block-*.safetensors"))
        assert len(files) == 3
        for path in files:
            expected, found = load_file(path), load_file(tmp_path / "many" / path.name)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                # Activations are float32 and do not depend on who computes them; the order of the sums does.
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=float(tensor.abs().max()) * 1e-6)
        assert not (tmp_path / "many" / "work").exists()

    def test_conversion(self, launcher: Forked, model: Path, text: Path, tmp_path: Path) -> None:
        """Global budget, both metrics, killed on the way and finished by another number of processes."""
        budget = ["--keep", 0.5, "--method", "kfac", "--device", "cpu", "--no-check", *text_options(text)]
        line = [model, *budget, "--out", tmp_path / "many"]
        lost = together(launcher, 2, *line, victim=1, dies=("replace", 11), constants={BATCH_BYTES: 1})
        assert lost[0].status == -signal.SIGKILL, lost
        work = tmp_path / "many" / JOB_FOLDER / "work"
        assert list(work.glob("decompositions/layers*")), "something was done that need not be done again"
        done = together(launcher, 3, *line)
        assert statuses(done) == [0, 0, 0], done
        chosen = Calibration(str(text), samples=7, length=32, batch_size=2)
        report = convert(
            model, tmp_path / "one", keep=0.5, method="kfac", calibration=chosen, device="cpu", check=False
        )
        one, many = (json.loads((tmp_path / name / "svdconvert.json").read_text()) for name in ("one", "many"))
        assert len(many["timing"]) == 3
        assert many["predicted_loss"] == pytest.approx(one["predicted_loss"], rel=1e-5)
        assert {n: m["rank"] for n, m in many["matrices"].items()} == report.plan.ranks
        first, second = read_weights(tmp_path / "one"), read_weights(tmp_path / "many")
        for module in report.plan.ranks:
            up, down = (f"gpt_neox.{module}.{factor}.weight" for factor in ("up", "down"))
            expected = first[up].float() @ first[down].float()
            difference = second[up].float() @ second[down].float() - expected
            assert float(difference.norm() / expected.norm()) < 2e-3, module

    def test_refit(self, launcher: Forked, model: Path, tmp_path: Path) -> None:
        """The leader's work, one layer after the other: from given statistics, the bytes of a single process."""
        draw = random.Random(0)
        syllables = [chr(0xAC00 + draw.randrange(11172)) for _ in range(300)]
        words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(2000)]
        text, stats = tmp_path / "text.txt", tmp_path / "stats"
        text.write_text(" ".join(words), encoding="utf-8")
        calibrate(model, Calibration(str(text), samples=32, length=48), stats, methods=["whiten"], device="cpu")
        line = [model, "--keep", 0.3, "--method", "whiten", "--stats", stats, "--refit", "sequential"]
        done = together(launcher, 2, *line, "--device", "cpu", "--out", tmp_path / "many")
        assert statuses(done) == [0, 0], done
        assert printed(done).count("the refit brought the loss from") == 1
        settings = {"method": "whiten", "stats": stats, "refit": "sequential", "device": "cpu"}
        report = convert(model, tmp_path / "one", keep=0.3, **settings)
        told = report.outcome.record["refit"]
        assert told["refitted"] < told["truncated"], "it was taken"
        assert tree(tmp_path / "many") == tree(tmp_path / "one")

    def test_fewer_sequences_than_processes(self, launcher: Forked, model: Path, text: Path, tmp_path: Path) -> None:
        line = ["calibrate", model, "--out", tmp_path / "out", "--device", "cpu", "--calib", text]
        done = together(launcher, 2, *line, "--calib-samples", 1, "--calib-length", 32)
        assert all(statuses(done)), done
        (sentence,) = sentences("".join(ended.err for ended in done))
        assert sentence == (
            "Error: 1 calibration sequences are too few for 2 processes; raise --calib-samples or start fewer"
        )


class Member(Group):
    """One of several processes, without the others."""

    def __init__(self, rank: int, size: int, shared: Sequence[object] = ()) -> None:
        self.rank, self.size, self._shared = rank, size, list(shared)

    def share(self, value):  # type: ignore[no-untyped-def]
        return value if self.leader else self._shared.pop(0)


class TestFolder:
    def test_the_lock_is_held_by_every_process(self, tmp_path: Path) -> None:
        """A process that outlives the others still keeps a new job out."""

        @contextmanager
        def refused() -> Iterator[None]:
            with pytest.raises(InputError, match="in use by another"):
                yield

        with OutputFolder(tmp_path / "out", {"a": 1}, group=Member(1, 2)):
            for overwrite in (False, True):
                with refused(), OutputFolder(tmp_path / "out", {"a": 1}, overwrite=overwrite):
                    pass
        with OutputFolder(tmp_path / "out", {"a": 1}, group=Member(0, 2)) as leader:
            with refused(), OutputFolder(tmp_path / "out", {"a": 1}):
                pass
            with OutputFolder(tmp_path / "out", {"a": 1}, group=Member(1, 2)):
                handle = os.open(leader.job / "lock", os.O_RDWR)
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                os.close(handle)

    def test_what_another_process_wrote_must_be_visible(self, tmp_path: Path) -> None:
        infos = [TensorInfo(name, "U8", (4,)) for name in "ab"]
        output = OutputFolder(tmp_path / "out", {}, group=Member(0, 2))
        with output:
            writer = ShardWriter(output, {"model.safetensors": infos})
            other = Member(1, 2, shared=[[]])
            theirs = OutputFolder(tmp_path / "out", {}, group=other)
            with theirs:
                second = ShardWriter(theirs, {"model.safetensors": infos})
                second.write("b", memoryview(b"bbbb"))
                second.finish("b", ["b"], {"rank": 2})
                assert second.record() == []
                second.close()
            writer.write("a", memoryview(b"aaaa"))
            assert writer.finish("a", ["a"], {}) == []
            assert writer.record() == []
            writer.close()
            journal = output.job / "journal-1.jsonl"
            shutil.move(journal, tmp_path / "hidden")
            with pytest.raises(JobError, match=r"model\.safetensors lack what another process wrote"):
                writer.join()
            shutil.move(tmp_path / "hidden", journal)
            assert [name for name, _ in writer.join()] == ["model.safetensors"]
            assert writer.reports["b"] == {"rank": 2}
        assert (tmp_path / "out" / "model.safetensors").read_bytes()[-8:] == b"aaaabbbb"


def test_alone_by_default(monkeypatch: pytest.MonkeyPatch, run: Callable[..., SimpleNamespace], model: Path) -> None:
    """One process of a launcher is one process; a library call does not wait for others that it was not told of."""
    from svdconvert.machine import processes

    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not processes.launched()
    assert processes.join().size == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.current().size == 1
    assert processes.launched()
