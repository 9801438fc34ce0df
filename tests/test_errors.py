"""What a user can get wrong: exit code 2 and one sentence that names the key, file or line, and the mend."""

from __future__ import annotations

import functools
import gzip
import json
import re
import shutil

import pytest
import runs

from streamsynth import assemble
from streamsynth import main as main_lib
from streamsynth.config import flatten
from streamsynth.defaults import default_config
from streamsynth.errors import UserError


@pytest.fixture
def mistake(capsys):
    """Runs a command line that must be refused, and returns the sentence."""

    def refused(*argv: str) -> str:
        assert main_lib.main(argv) == 2
        lines = capsys.readouterr().err.splitlines()
        [error] = [line for line in lines if not line.startswith("synthesizing")]  # a progress line
        assert error.startswith("streamsynth: error: "), error
        return error

    return refused


@pytest.fixture
def train(mistake, tmp_path):
    """Refused trainings of the tiny quickstart, with overrides; nothing of them may be left."""

    def refused(*more: str, arg: str = "tiny") -> str:
        workdir = tmp_path / "run"
        argv = ["train", f"--config={runs.QUICKSTART}:{arg}", f"--workdir={workdir}"]
        error = mistake(*argv, f"--config.cache_dir={tmp_path / 'cache'}", *more)
        assert not workdir.exists()
        assert not (tmp_path / "cache").exists()  # said before any policy is trained
        return error

    return refused


@pytest.mark.parametrize(
    "arg, sentence",
    [
        ("tinny", "'tinny' is not known; it takes: tiny, seed, stream"),
        ("tiny,seed", "needs a value, such as seed=0"),
        ("tiny,seed=one", "is a whole number, not 'one'"),
        ("tiny,stream=other", "stream"),
    ],
)
def test_a_malformed_argument(train, arg, sentence):
    assert sentence in train(arg=arg)


# Keys that would otherwise end in a traceback, or be found wrong after minutes, or never.
KEYS = [
    ("learner.stepz=1", "nearest are: learner.steps"),
    ("learner.steps=x", "--config.learner.steps is a whole number, not 'x'"),
    ("learner.steps=-1", "learner.steps = -1"),
    ("learner.kl_reference=past", "choose one of turn, base"),
    ("seed=-1", "seed = -1"),
    ("rollout.prompts=0", "rollout.prompts = 0"),
    ("rollout.samples=1", "rollout.samples = 1 is out of range: give 2 or more"),
    ("rollout.prompt_length=3", "rollout.prompt_length = 3"),
    ("rollout.completion_length=1", "rollout.completion_length = 1"),
    ("rollout.temperature=0", "rollout.temperature = 0.0"),
    ("rollout.temperature=nan", "rollout.temperature = nan"),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate = inf"),
    ("optimizer.name=lion", "optimizer.name = 'lion' is not known: choose one of adamw"),
    ("optimizer.b2=1.0", "optimizer.b2 = 1.0"),
    ("pretrain.optimizer.schedule=wavy", "pretrain.optimizer.schedule = 'wavy' is not known"),
    ("pretrain.sources=worlds,worlds:bank_1", "pretrain.sources"),
    ("pretrain.sources=", "pretrain.sources = ()"),
    ("stream.tasks=", "stream.tasks"),
    ("stream.tasks=worlds:atlantis", "atlantis"),
    ("stream.tasks=world:bank_1", "world"),
    ("stream.tasks=worlds:bank_1,worlds:bank_1", "two tasks named 'bank_1'"),
    ("stream.experience=total", "choose one of sequential, isolated"),
    ("stream.on_bad_row=ignore", "choose one of error, skip"),
    ("stream.examples_per_label=0", "stream.examples_per_label = 0"),
    ("stream.examples_per_label=100000000", "examples"),
    ("stream.train_limit=3", "train_limit=3"),
    ("scheduler.strategy=random", "choose one of progress, uniform"),
    ("scheduler.fast=0.99", "fast below slow"),
    ("patterns.temperature=0", "patterns.temperature = 0"),
    ("patterns.choice=greedy", "choose one of softmax, thompson, ucb"),
    ("feedback.features=words", "choose one of ngrams, hidden"),
    ("feedback.judges.posterior=-1", "feedback.judges.posterior = -1.0"),
    ("feedback.judges.oracle=1", "feedback.judges.oracle"),
    ("feedback.accept=0", "feedback.accept = 0.0"),
    ("feedback.min_words=99", "feedback.max_words = 60 is below feedback.min_words = 99"),
    ("balance.target=mean", "choose one of base, policy, examples"),
    ("balance.batches=0", "balance.batches = 0"),
    ("replay.capacity=0", "replay.capacity = 0"),
    ("replay.share=100", "replay.capacity"),
    ("policy.kv_heads=3", "not a multiple of policy.kv_heads = 3"),
    ("policy.head_width=7", "policy.head_width = 7 must be even"),
    ("policy.vocab_size=10", "policy.vocab_size = 10"),
    ("mesh.data=7", "mesh.data = 7"),
    ("mesh.data=0", "mesh.data = 0"),
    ("mesh.tensor=-1", "both -1"),
    ("learner.microbatches=3", "learner.microbatches = 3 does not divide rollout.prompts = "),
    ("checkpoint.every=0", "checkpoint.every = 0"),
    ("evaluation.samples=0", "evaluation.samples = 0"),
    ("dataset.near_duplicate=2", "dataset.near_duplicate = 2.0"),
]


@pytest.mark.parametrize("override, sentence", KEYS, ids=[override for override, _ in KEYS])
def test_a_key_that_cannot_be_computed_with(train, override, sentence):
    assert sentence in train(f"--config.{override}")


def test_every_number_has_a_range():
    """No numeric key of the default config takes whatever it is given."""
    for key, value in flatten(default_config()).items():
        if type(value) not in (int, float) or key.startswith("mesh."):  # there, -1 is for what is left
            continue
        config = default_config()
        *groups, name = key.split(".")
        functools.reduce(getattr, groups, config)[name] = type(value)(-1)
        with pytest.raises(UserError, match=re.escape(key)):
            assemble.check(config)
            pytest.fail(f"{key} = -1 is let through")


@pytest.mark.parametrize(
    "body, sentence",
    [
        ("config.learner.steps = 2.5", "line 5: TypeError"),
        ("config.learner.step = 2", "line 5: AttributeError"),
        ("config = ml_collections.ConfigDict({'seed': 1})", "The config lacks the key"),
        ("config.unlock(); config.extra = 1", "The config key extra is not known"),
        ("config.stream.tasks = (1, 2)", "stream.tasks = (1, 2) must be specs"),
        ("config.feedback.unlock(); config.feedback.judges = dict(oracle=1.0)", "feedback.judges.oracle"),
        ("this is no Python", "line 5 is not valid Python"),
    ],
)
def test_a_config_file_with_a_mistake(mistake, tmp_path, body, sentence):
    path = tmp_path / "mine.py"
    path.write_text(
        "import ml_collections\nfrom streamsynth.defaults import default_config\n"
        f"def get_config():\n    config = default_config()\n    {body}\n    return config\n"
    )
    assert sentence in mistake("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_not_there(mistake, tmp_path):
    error = mistake("train", f"--config={tmp_path / 'absent.py'}", f"--workdir={tmp_path / 'run'}")
    assert "absent.py does not exist" in error


# --- Data ---


def rows(count: int, **change) -> list[dict]:
    return [{"text": f"text number {i}", "label": "ab"[i % 2], **change} for i in range(count)]


def write(path, records) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_an_empty_folder(train, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    error = train(f"--config.stream.tasks=files:{folder}")
    assert str(folder) in error
    assert "train.jsonl" in error


def test_a_folder_that_is_not_there(train, tmp_path):
    assert str(tmp_path / "absent") in train(f"--config.stream.tasks=files:{tmp_path / 'absent'}")


def test_a_label_with_too_few_examples(train, tmp_path):
    write(tmp_path / "data" / "train.jsonl", [*rows(60), {"text": "lonely", "label": "rare"}])
    error = train(f"--config.stream.tasks=files:{tmp_path / 'data'}")
    assert "rare" in error
    assert "examples_per_label" in error


def test_a_row_without_text(train, tmp_path):
    write(tmp_path / "data" / "train.jsonl", [*rows(60), {"label": "a"}])
    error = train(f"--config.stream.tasks=files:{tmp_path / 'data'}")
    assert "train.jsonl" in error
    assert "line 61" in error
    assert "text" in error


def test_a_row_that_is_no_json(train, tmp_path):
    write(tmp_path / "data" / "train.jsonl", rows(60))
    with open(tmp_path / "data" / "train.jsonl", "a") as file:
        file.write("{text: 1\n")
    assert "line 61" in train(f"--config.stream.tasks=files:{tmp_path / 'data'}")


def test_a_truncated_gzip(train, tmp_path):
    (tmp_path / "data").mkdir()
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows(200)).encode())
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    error = train(f"--config.stream.tasks=files:{tmp_path / 'data'}")
    assert "train.jsonl.gz" in error


# --- Workdirs ---


@pytest.mark.parametrize(
    "verb", [("evaluate",), ("report",), ("synthesize", "--task=bank_1", "--rows=4", "--output=rows")]
)
def test_a_workdir_without_a_run(mistake, tmp_path, verb):
    error = mistake(*verb, f"--workdir={tmp_path}")
    assert str(tmp_path) in error
    assert "holds no run" in error


@pytest.mark.parametrize(
    "verb", [("evaluate",), ("synthesize", "--task=bank_1", "--rows=4", "--output=rows")]
)
def test_a_run_without_a_checkpoint(mistake, finished, tmp_path, verb):
    shutil.copy(finished.workdir / "config.json", tmp_path)
    assert "has no checkpoint yet" in mistake(*verb, f"--workdir={tmp_path}")


def test_a_folder_with_something_else_in_it(mistake, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    error = mistake("train", f"--config={runs.QUICKSTART}:tiny", f"--workdir={tmp_path}")
    assert "is not empty and holds no run" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_workdir_that_is_a_file(mistake, tmp_path):
    (tmp_path / "file").write_text("mine")
    error = mistake("train", f"--config={runs.QUICKSTART}:tiny", f"--workdir={tmp_path / 'file'}")
    assert str(tmp_path / "file") in error


def test_experience_of_nothing(train, tmp_path):
    assert "holds no run" in train(f"--init_from={tmp_path / 'absent'}")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run without what it does not need to go on."""
    for name in ("config.json", "checkpoints", "policy", "kept", "metrics.jsonl", "evaluations.jsonl"):
        source, target = finished.workdir / name, tmp_path / "copy" / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return tmp_path / "copy"


def test_a_checkpoint_of_another_config(mistake, finished, copied):
    config = json.loads((copied / "config.json").read_text())
    config["feedback"]["width"] = 64
    (copied / "config.json").write_text(json.dumps(config))
    argv = runs.arguments(finished.cache, copied, "--config.feedback.width=64")
    error = mistake(*argv)
    assert "the checkpoint belongs to another config" in error
    assert "archive/matrix" in error


def test_a_config_that_was_edited(mistake, copied):
    (copied / "config.json").write_text('{"seed": 0')
    assert "config.json is not JSON" in mistake("evaluate", f"--workdir={copied}")
    (copied / "config.json").write_text('{"seed": 0}')
    assert "The config lacks the key" in mistake("evaluate", f"--workdir={copied}")


def test_a_journal_that_was_cut(mistake, finished, copied):
    with open(copied / "metrics.jsonl", "r+b") as file:
        file.truncate(100)
    error = mistake(*runs.arguments(finished.cache, copied))
    assert "metrics.jsonl" in error
    assert "the file was cut" in error


def test_a_policy_that_was_cut(mistake, finished, copied):
    with open(copied / "policy" / "params.safetensors", "r+b") as file:
        file.truncate(100)
    assert str(copied / "policy") in mistake(*runs.arguments(finished.cache, copied))


def test_more_rows_than_the_policy_can_write(mistake, finished, tmp_path, monkeypatch):
    from streamsynth import synthesize

    monkeypatch.setattr(synthesize, "_MOST_SAMPLES_PER_ROW", 0)
    argv = ("synthesize", f"--workdir={finished.workdir}", "--task=market_1", f"--output={tmp_path / 'rows'}")
    error = mistake(*argv, "--rows=4000")
    assert "of 1000 rows of label" in error
    assert "ask for fewer --rows" in error
    assert not (tmp_path / "rows").exists()
