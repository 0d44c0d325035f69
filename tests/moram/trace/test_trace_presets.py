"""Presets of `moram trace`: the published protocol, and what fits a laptop."""

import pytest

from moram.trace.settings import make_settings

GIVEN = {"model": "m", "data": "d"}
TRACE = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds")
TRACE += ("20Minuten",)
# From the released runner and the comparison's code base, one number a task in TRACE's order.
SHORT, LONG = (2, 1, 3, 2, 1, 2, 2, 3), (5, 3, 7, 5, 3, 5, 5, 7)


def paper(method="moram", **changes):
    return make_settings("paper", method, changes=[GIVEN | changes])


def small(method="moram", **changes):
    return make_settings("small", method, changes=[GIVEN | {"model": "smollm2"} | changes])


@pytest.mark.parametrize(
    ("method", "lr", "epochs", "arguments"),
    [
        ("moram", 5e-4, SHORT, {"value_scale": 2.0, "temperature": 0.03, "threshold": 0.2}),
        ("lora", 1e-4, LONG, {"alpha": 32}),
        ("o-lora", 1e-4, LONG, {"alpha": 32}),
        ("hide-lora", 1e-4, LONG, {"alpha": 32}),
        ("tree-lora", 1e-4, SHORT, {"alpha": 32}),
        ("ewc", 1e-4, (1, 1, 5, 5, 1, 5, 5, 5), {"alpha": 32}),
        ("joint", 1e-4, LONG, {"alpha": 32}),
    ],
)
def test_preset_paper_has_the_published_rates_and_epochs(method, lr, epochs, arguments):
    settings = paper(method)
    assert settings.tasks == TRACE
    for task, expected in zip(TRACE, epochs, strict=True):
        train = settings.train_settings(task)
        assert (train.lr, train.epochs) == (lr, expected), task
    assert settings.method_args == arguments


def test_preset_paper_has_the_published_optimiser_lengths_and_decoding():
    settings = paper()
    train = settings.train_settings("FOMC")
    assert (train.batch_size, train.betas, train.clip) == (32, (0.9, 0.95), 1.0)
    assert (train.schedule, train.average, train.seed) == ("constant", "example", 1234)
    assert settings.rank == 8 and settings.dropout == 0.1
    for task in TRACE:
        limit = 4096 if task == "MeetingBank" else 1024
        assert settings.of("max_prompt", task) == limit, task
        assert settings.of("max_new_tokens", task) == 512
        assert settings.of("decoding", task) == "generate"
    assert settings.max_answer == 512 and settings.labels == "separate"
    assert settings.truncate_right == ("MeetingBank",) and settings.pad_multiple == 8
    assert (settings.repetition_penalty, settings.no_repeat_ngram) == (1.2, 3)
    assert settings.eval_batch == 1 and settings.eval_split == "test"


def test_demonstrations_have_the_published_room_in_prompts():
    assert paper("in-context").of("max_prompt", "FOMC") == 3584
    assert paper("in-context").of("max_prompt", "MeetingBank") == 4096
    own = small("in-context")
    # Six examples of the small preset's size and the question fit.
    assert own.of("max_prompt", "FOMC") == own.method_args["max_length"] >= 6 * (112 + 16) + 112


def test_preset_paper_trains_tasks_it_does_not_know_for_one_epoch():
    for method in ("moram", "lora", "ewc"):
        settings = paper(method, tasks=("mine",))
        assert settings.of("epochs", "mine") == 1 and settings.of("max_prompt", "mine") == 1024


def test_preset_small_needs_no_model_and_scores_in_one_pass():
    settings = make_settings("small", changes=[{"data": "d"}])
    assert settings.model == "smollm2" and settings.of("decoding", "FOMC") == "forced"
    assert settings.of("decoding", "Py150") == "generate", "its score needs free text"
    assert settings.cache_prefix and settings.first_layer == 20
    assert settings.labels == "joined" and settings.lr == 2e-3
    assert settings.method_args == {"value_scale": 8.0}
    assert small("ewc").method_args == {"fisher_examples": 64}
    assert small("lora").method_args == {}
