"""Configs: arguments, files, overrides, and what is said where one of them is wrong."""

from __future__ import annotations

import json
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from streamsynth import config as config_lib
from streamsynth.errors import UserError

FILE = """
    from ml_collections import ConfigDict, config_dict
    from streamsynth import config as config_lib

    def get_config(arg=""):
        arg = config_lib.parse_arg(arg, tiny=False, seed=0)
        learner = dict(learning_rate=1e-3, steps=100, balance=True, weights=dict(judge=0.5, attribute=0.5))
        seed = config_dict.FieldReference(arg.seed)
        return ConfigDict(dict(
            seed=seed, next_seed=seed + 1, name="quick", learner=learner,
            stream=dict(
                tasks=("worlds:a", "worlds:b"), sizes=[1, 2], limit=config_dict.placeholder(int), note=None
            ),
        ))
"""


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "quick.py"
    path.write_text(textwrap.dedent(FILE))
    return str(path)


# --------------------------------------------------------------------------------------- the argument


def test_a_bare_word_is_true_and_values_take_the_types_of_the_defaults():
    arg = config_lib.parse_arg(
        "tiny, seed=3,rate=1e-2,name=a=b", tiny=False, seed=0, rate=1.0, name="", rest=7
    )
    assert arg.to_dict() == {"tiny": True, "seed": 3, "rate": 0.01, "name": "a=b", "rest": 7}
    assert config_lib.parse_arg("", tiny=False).tiny is False
    assert config_lib.parse_arg(None, tiny=True).tiny is True
    assert config_lib.parse_arg("tiny=false", tiny=True).tiny is False


@pytest.mark.parametrize(
    "arg, sentence",
    [
        ("tinny", "'tinny' is not known; it takes: tiny, seed"),
        ("seed", "'seed' needs a value, such as seed=0"),
        ("seed=x", "'seed' is a whole number, not 'x'"),
        ("seed=1.5", "'seed' is a whole number, not '1.5'"),
        ("tiny=yes", "'tiny' is true or false, not 'yes'"),
        ("seed=1,seed=2", "'seed' is given twice"),
    ],
)
def test_arguments_are_strict(arg, sentence):
    with pytest.raises(UserError, match=sentence):
        config_lib.parse_arg(arg, tiny=False, seed=0)


# ------------------------------------------------------------------------------------------ resolving


def test_overrides_take_the_type_of_their_key(file):
    overrides = {
        "learner.learning_rate": "2",
        "learner.balance": "False",
        "learner.weights.judge": "1e-1",
        "stream.tasks": "files:x?commonest=10,worlds:c,worlds:d",
        "stream.sizes": "[3]",
        "stream.limit": "8",
        "stream.note": "some text",
        "name": "2",
    }
    config = config_lib.load(f"{file}:tiny,seed=5", overrides)
    assert config.to_dict() == {
        "seed": 5,
        "next_seed": 6,
        "name": "2",
        "learner": {
            "learning_rate": 2.0,
            "steps": 100,
            "balance": False,
            "weights": {"judge": 0.1, "attribute": 0.5},
        },
        "stream": {
            "tasks": ("files:x?commonest=10", "worlds:c", "worlds:d"),
            "sizes": (3,),
            "limit": 8,
            "note": "some text",
        },
    }
    assert type(config.learner.learning_rate) is float
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.learner.learning_rat = 1.0


def test_an_overridden_reference_carries_what_is_computed_from_it(file):
    assert config_lib.load(file, {"seed": "9"}).next_seed == 10


def test_none_and_empty_tuples(file):
    config = config_lib.load(file, {"stream.limit": "none", "stream.note": "None", "stream.tasks": ""})
    assert (config.stream.limit, config.stream.note, config.stream.tasks) == (None, None, ())


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        (
            "learner.lerning_rate",
            "1",
            r"--config\.learner\.lerning_rate: .* the nearest are: learner.learning_rate",
        ),
        ("learning_rate", "1", "the nearest are: learner.learning_rate"),
        ("zzz", "1", "its groups and keys are: .*learner.*stream"),
        ("learner.steps.x", "1", "no such key"),
        ("learner.weights", "1", "is a group .* --config.learner.weights.judge"),
        ("learner.steps", "1.5", "--config.learner.steps is a whole number, not '1.5'"),
        ("learner.steps", "none", "--config.learner.steps is a whole number, not 'none'"),
        ("learner.learning_rate", "fast", "--config.learner.learning_rate is a number, not 'fast'"),
        ("learner.balance", "1", "--config.learner.balance is true or false, not '1'"),
        ("stream.sizes", "1,b", "--config.stream.sizes is a whole number, not 'b'"),
        ("stream.sizes", "(1,", "is no Python literal"),
        ("stream.limit", "many", "--config.stream.limit is a whole number, not 'many'"),
    ],
)
def test_wrong_overrides_name_the_key_and_the_mend(file, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        config_lib.load(file, {key: value})


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("x = 1\n", "has no function get_config"),
        ("def get_config(arg):\n  return {}\n", "get_config must return a ConfigDict, not dict"),
        ("x = 1\ndef get_config(arg)\n  pass\n", r"broken\.py, line 2 is not valid Python"),
        ("import jaxx\n", r"broken\.py, line 1: ModuleNotFoundError: No module named 'jaxx'"),
        ("def get_config(arg):\n  y = 0\n  return 1 / y\n", r"broken\.py, line 3: ZeroDivisionError"),
        ("get_config = 3\n", "has no function get_config"),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(arg):\n  return ConfigDict({'f': {'g': len}})\n",
            "config key f.g holds a builtin_function_or_method",
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(arg):\n  c = ConfigDict({'steps': 3}).lock()\n"
            "  c.stepps = 4\n  return c\n",
            r'broken\.py, line 4: AttributeError: Key "stepps" does not exist .* Did you mean "steps"',
        ),
    ],
)
def test_wrong_files_are_said_with_their_line_in_one_sentence(tmp_path, source, sentence):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(UserError, match=sentence) as caught:
        config_lib.load(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_and_arguments_that_do_not_fit(file, tmp_path):
    with pytest.raises(UserError, match=r"absent\.py does not exist"):
        config_lib.load(str(tmp_path / "absent.py"))
    with pytest.raises(UserError, match="does not exist"):
        config_lib.load(str(tmp_path))
    with pytest.raises(UserError, match=r"quick\.py: The config's argument 'tinny' is not known"):
        config_lib.load(f"{file}:tinny")
    fixed = tmp_path / "fixed.py"
    fixed.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'a': 1})\n"
    )
    assert config_lib.load(str(fixed)).a == 1
    with pytest.raises(UserError, match="takes no argument, but 'tiny'"):
        config_lib.load(f"{fixed}:tiny")
    text = tmp_path / "config.json"
    text.write_text("{}")
    with pytest.raises(UserError, match="no Python file"):
        config_lib.load(str(text))


# ------------------------------------------------------------------------------------- JSON and hashes

names = st.from_regex(r"[a-z_]{1,6}", fullmatch=True).filter(lambda name: not hasattr(ConfigDict(), name))
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
groups = st.recursive(
    st.dictionaries(names, values | st.lists(values, max_size=3).map(tuple), max_size=4),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)


@given(groups)
def test_a_config_survives_json(plain):
    config = config_lib.from_json(json.dumps(plain))
    again = config_lib.from_json(config_lib.to_json(config))
    assert again.to_dict() == plain
    assert again.is_locked
    assert config_lib.content_hash(again) == config_lib.content_hash(config)
    assert config_lib.differences(config, again) == {}


def test_the_hash_follows_the_values_and_not_their_order():
    a, b, c = (ConfigDict(d) for d in ({"x": 1, "y": (2,)}, {"y": (2,), "x": 1}, {"x": 1, "y": (3,)}))
    assert config_lib.content_hash(a) == config_lib.content_hash(b) != config_lib.content_hash(c)
    assert len(config_lib.content_hash(a)) == 16


def test_differences_name_every_key_that_differs():
    old = ConfigDict({"a": {"b": 1, "c": "x"}, "gone": {}, "same": (1, 2)})
    new = ConfigDict({"a": {"b": 2, "c": "x", "d": None}, "same": (1, 2)})
    assert config_lib.differences(old, new) == {
        "a.b": ("1", "2"),
        "a.d": ("absent", "None"),
        "gone": ("{}", "absent"),
    }


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_config_json_is_named(text):
    with pytest.raises(UserError, match=r"run/config\.json"):
        config_lib.from_json(text, "run/config.json")
