"""Answers of a model: against greedy decoding written out plainly, without cache and padding."""

from types import SimpleNamespace

import pytest
import torch
from choices import DRAWN, TRAINED, Choices, answers_of, assert_same_answers
from tiny_models import language_model
from trace_support import TASKS, make_tokenizer, settings_for, write_data, write_model

from moram.continual.scoring import IGNORED
from moram.methods.train import summed_loss
from moram.processes import Processes
from moram.trace.encode import Encoder
from moram.trace.model import fit_context, load
from moram.trace.predict import forced, generate
from moram.trace.prefix import CachedRows, Prefix
from moram.trace.run import run_trace
from moram.trace.settings import make_settings

EOS = 1
PROMPTS = ["a", "letters 1x:", "colours and sizes 12:", "b?", "Stance:", "zzzz", "0", "the longest"]
PLAIN = {"labels": "joined", "decoding": "generate", "max_new_tokens": 12, "max_answer": 16}


@pytest.fixture(scope="module")
def model():
    model = language_model(vocab_size=264, initializer_range=0.4, max_position_embeddings=128)
    with torch.no_grad():
        # It writes a few printable bytes, those with the ids 4 to 15, and the end.
        model.lm_head.weight[16:] = model.lm_head.weight[2:4] = model.lm_head.weight[0] = 0
    return model


def settings(**changes):
    return settings_for("m", "d", "o", **(PLAIN | changes))


def plain_greedy(model, prompt, count, penalty=1.0, ngram=0, stops=(EOS,)):
    """The tokens that greedy decoding writes: one whole pass a token, no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        for seen in set(ids):
            logits[seen] *= penalty if logits[seen] < 0 else 1 / penalty
        for start in range(len(ids) - ngram + 1) if ngram else ():
            if ids[start : start + ngram - 1] == ids[len(ids) - ngram + 1 :]:
                logits[ids[start + ngram - 1]] = -torch.inf
        best, second = logits.topk(2).values
        assert best - second > DRAWN, "rounding could decide: the case compares nothing"
        ids.append(int(logits.argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def texts_of(tokenizer, tokens):
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


def answers(model, tokenizer, own, texts=PROMPTS):
    rows = Encoder(tokenizer, own).prompts("letters", texts)
    done = []
    found = generate(model, tokenizer, rows, own, "letters", Processes(), done.append)
    assert sum(done) == len(texts)
    return rows.ids, found


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("labels", ["joined", "separate"])
def test_generation_is_plain_greedy_decoding_in_any_batch(model, batch, labels):
    tokenizer = make_tokenizer()
    ids, found = answers(model, tokenizer, settings(eval_batch=batch, labels=labels))
    expected = [plain_greedy(model, row, 12) for row in ids]
    assert found == texts_of(tokenizer, expected)
    assert len(set(found)) > 5, "the case should tell answers apart"


@pytest.mark.parametrize("family", ["Mistral", "Gemma", "Gemma2", "Gemma3", "Qwen2", "Qwen3"])
def test_generation_is_plain_greedy_decoding_for_every_family(family):
    model = language_model(family, vocab_size=264, max_position_embeddings=128)
    tokenizer = make_tokenizer()
    ids, found = answers(model, tokenizer, settings(eval_batch=8, max_new_tokens=6))
    assert found == texts_of(tokenizer, [plain_greedy(model, row, 6) for row in ids])


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_penalty_and_ngrams_reach_generation_and_do_not_see_padding(model, batch, pad):
    tokenizer = make_tokenizer()
    # Many models pad with the end of text: padding must not make the end less likely.
    tokenizer.pad_token = pad
    own = settings(eval_batch=batch, repetition_penalty=1.2, no_repeat_ngram=2, pad_multiple=32)
    ids, found = answers(model, tokenizer, own)
    expected = texts_of(tokenizer, [plain_greedy(model, row, 12, 1.2, 2) for row in ids])
    assert found == expected
    assert expected != texts_of(tokenizer, [plain_greedy(model, row, 12) for row in ids])
    assert expected != texts_of(tokenizer, [plain_greedy(model, row, 12, 1.2) for row in ids])


def test_padding_with_the_end_of_text_does_not_put_off_the_end():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    model = language_model(vocab_size=264)
    with torch.no_grad():
        # The end is the most likely token by a little, as long as it is not penalised.
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(264))
        model.lm_head.bias[EOS], model.lm_head.bias[100] = 1.1, 1.0
    own = settings(eval_batch=8, repetition_penalty=1.5)
    _, found = answers(model, tokenizer, own)
    assert found == [""] * len(PROMPTS)


def test_generation_stops_at_every_end_that_model_or_tokenizer_name(model):
    tokenizer = make_tokenizer()
    rows, before = answers(model, tokenizer, settings())
    whole = plain_greedy(model, rows[1], 12)
    stop = whole[3]
    model.generation_config.eos_token_id = [EOS, stop]
    try:
        _, found = answers(model, tokenizer, settings())
    finally:
        model.generation_config.eos_token_id = None
    expected = [plain_greedy(model, row, 12, stops=(EOS, stop)) for row in rows]
    assert found == texts_of(tokenizer, expected)
    assert found[1] != before[1]


@pytest.mark.parametrize(
    "habit",
    [
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(4, 10))},
    ],
    ids=lambda habit: next(iter(habit)),
)
def test_what_a_model_folder_asks_of_generation_changes_no_answer(model, habit):
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig(**habit)
    tokenizer = make_tokenizer()
    try:
        ids, found = answers(model, tokenizer, settings(eval_batch=3))
        assert model.generation_config.to_diff_dict().items() >= habit.items()
    finally:
        model.generation_config = own
    assert found == texts_of(tokenizer, [plain_greedy(model, row, 12) for row in ids])


def test_generation_writes_as_many_tokens_as_a_task_allows(model):
    tokenizer = make_tokenizer()
    own = settings(max_new_tokens={"letters": 2, "*": 12})
    ids, found = answers(model, tokenizer, own)
    assert found == texts_of(tokenizer, [plain_greedy(model, row, 2) for row in ids])


@pytest.mark.parametrize("labels", ["joined", "separate"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_forced_decoding_agrees_with_generation(model, batch, labels):
    tokenizer = make_tokenizer()
    own = settings(labels=labels, eval_batch=batch, max_answer=16)
    prompts, written = answers(model, tokenizer, own)
    # What is written, its beginning, what is not written, and a wrong end of a right text.
    kinds = [
        written[0],
        written[1][:2],
        "no",
        written[3][:3] + "~",
        written[4],
        "",
        "x",
        written[7],
    ]
    kinds = [kind.removeprefix(" ") if labels == "joined" else kind for kind in kinds]
    pairs = list(zip(PROMPTS, kinds, strict=True))
    rows = Encoder(tokenizer, own).scored("letters", pairs)
    found = forced(model, tokenizer, rows, own, Processes())
    for ids, (_, answer), tokens, n, text in zip(
        prompts, pairs, rows.ids, rows.answers, found, strict=True
    ):
        wanted, greedy = tokens[-n:], plain_greedy(model, ids, 20)
        same = next((i for i in range(n) if wanted[i] != (greedy + [None] * n)[i]), n)
        assert text == tokenizer.decode(greedy[: same + 1], skip_special_tokens=True)[: len(text)]
        whole = tokenizer.decode(greedy, skip_special_tokens=True)
        assert whole.startswith(text)
        lead = " " if labels == "joined" else ""
        assert text.startswith(lead + answer) == whole.startswith(lead + answer), answer


class Knows(torch.nn.Module):
    """A model that finds the next token of its input the most likely, whatever it is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, logits_to_keep, **_):
        chosen = torch.nn.functional.one_hot(input_ids[:, logits_to_keep + 1], 264)
        return SimpleNamespace(logits=chosen.float())


def test_texts_keep_the_spaces_that_some_tokenizers_clean_away():
    tokenizer = make_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert tokenizer.decode(tokenizer("a .").input_ids) == "a."
    answer = "x = f ( a , 'b' ) . é"
    own = settings(max_answer=64)
    rows = Encoder(tokenizer, own).scored("letters", [("code: ", answer), ("c: ", "b !")])
    assert forced(Knows(), tokenizer, rows, own, Processes()) == [answer, "b !"]
    text = torch.tensor([tokenizer(answer, add_special_tokens=False).input_ids])
    model = language_model(vocab_size=264)
    model.generate = lambda input_ids, **_: torch.cat([input_ids, text], 1)
    assert answers(model, tokenizer, settings(eval_batch=1), ["p"])[1] == [answer]


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("first_layer", [1, 2])
def test_cached_prefixes_change_no_loss_and_no_answer(family, first_layer):
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": 264, "initializer_range": 0.3, "num_hidden_layers": 3}
    model = language_model(family, **sizes)
    own = settings(decoding="forced")
    pairs = [(prompt, f"{i}B") for i, prompt in enumerate(PROMPTS)]
    rows = Encoder(tokenizer, own).scored("letters", pairs)
    prefix = Prefix(model, first_layer)
    cached = CachedRows(rows, prefix.cache(rows, 3))
    part = torch.tensor([2, 0, 5])
    for example in (False, True):
        expected = summed_loss(model, rows, part, example)
        with prefix.upper():
            actual = summed_loss(model, cached, part, example)
        assert actual[0].item() == pytest.approx(expected[0].item(), abs=1e-4)
        assert actual[1:] == expected[1:] == (sum(rows.answers[i] for i in (2, 0, 5)), 3)
    with Choices(DRAWN) as choices:
        expected = forced(model, tokenizer, rows, own, Processes())
    assert choices.made and not choices.unclear
    with prefix.upper():
        assert forced(model, tokenizer, cached, own, Processes()) == expected
    assert len(model.model.layers) == 3


def test_cached_batches_hold_the_states_where_the_tokens_were():
    model = language_model(vocab_size=264)
    rows = Encoder(make_tokenizer(), settings()).scored("letters", [("ab", "c"), ("abcdef", "c")])
    prefix = Prefix(model, 1)
    cached = CachedRows.join([CachedRows(rows, prefix.cache(rows, 2))])
    states, mask, labels = cached.batch([0, 1])
    assert states.shape == (2, 16, 32) and len(cached) == 2
    assert torch.equal(mask, rows.batch([0, 1])[1])
    assert torch.equal(labels, rows.batch([0, 1])[2]) and (labels != IGNORED).sum() == 6
    with torch.no_grad():
        alone = model(torch.tensor([rows.ids[0]]), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(states[0, -len(rows.ids[0]) :], alone[0], atol=1e-5, rtol=1e-5)
    assert not states[mask == 0].any()


@pytest.mark.parametrize("method", ["moram", "lora", "task-lora"])
@pytest.mark.parametrize("decoding", ["forced", {"colours": "generate", "*": "forced"}])
def test_a_run_with_cached_prefixes_ends_as_one_without(tmp_path, method, decoding):
    folder = write_model(tmp_path / "model", num_hidden_layers=3)
    data = write_data(tmp_path / "data")
    found = {}
    for cache in (False, True):
        out = tmp_path / str(cache)
        changes = {"first_layer": 2, "cache_prefix": cache, "full_matrix": True}
        changes["decoding"] = decoding
        with Choices(TRAINED) as choices:
            results = run_trace(settings_for(folder, data, out, method, **changes))
        losses = [line.split(",")[2] for line in (out / "steps.csv").read_text().splitlines()[1:]]
        found[cache] = results["matrix"], answers_of(out), [float(loss) for loss in losses]
    if assert_same_answers(found[True][1], found[False][1], choices):
        assert found[True][0] == found[False][0]
    assert found[True][2] == pytest.approx(found[False][2], abs=1e-4)
    assert len(found[True][2]) == len(TASKS) * 8


@pytest.mark.parametrize("family", ["Mistral", "Gemma", "Gemma2", "Qwen3"])
def test_prefixes_of_families_whose_layers_know_their_place_are_refused(family):
    model = language_model(family)
    with pytest.raises(ValueError, match=r"cache_prefix works for llama, qwen2 .*, got "):
        Prefix(model, 1)


def test_prefixes_of_models_with_dropout_are_refused():
    model = language_model(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"needs a model without dropout, got 0\.1"):
        Prefix(model, 1)


@pytest.mark.parametrize("layer", [2, 7])
def test_a_first_layer_that_the_model_lacks_is_refused(layer):
    with pytest.raises(ValueError, match=f"below the model's 2 layers, got {layer}"):
        Prefix(language_model(), layer)


def small_settings(tmp_path, **changes):
    return settings_for(write_model(tmp_path), "d", "o", **(PLAIN | changes))


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"decoding": "forced", "max_prompt": 113, "max_answer": 16}, 16),
        ({"max_prompt": 100, "max_answer": 4, "max_new_tokens": 29}, 29),
        ({"max_prompt": {"colours": 127, "*": 3}, "max_answer": 2, "max_new_tokens": 1}, 2),
    ],
)
def test_texts_longer_than_the_models_context_are_refused(tmp_path, changes, tokens):
    model, _ = load(small_settings(tmp_path), torch.device("cpu"), print)
    message = f"and {tokens} tokens of answer for .* do not fit the model's context of 128"
    with pytest.raises(ValueError, match=message):
        fit_context(model, small_settings(tmp_path, **changes), print)


def test_texts_that_just_fit_the_context_are_not_refused(tmp_path):
    own = small_settings(tmp_path, max_prompt=112, max_new_tokens=16)
    model, tokenizer = load(own, torch.device("cpu"), print)
    assert not model.training and tokenizer.eos_token_id == EOS
    assert {fit_context(model, own, print).of("max_prompt", task) for task in TASKS} == {112}


def test_with_fit_context_prompts_are_cut_to_what_the_context_leaves(tmp_path):
    changes = {"max_prompt": {"colours": 4096, "*": 20}, "max_new_tokens": 16, "fit_context": True}
    own, said = small_settings(tmp_path, **changes), []
    model, _ = load(own, torch.device("cpu"), print)
    fitted = fit_context(model, own, said.append)
    assert [fitted.of("max_prompt", task) for task in TASKS] == [20, 112, 20]
    assert said == ["colours: max_prompt 4096 -> 112, to fit the context of 128"]
    with pytest.raises(ValueError, match="do not fit the model's context of 128"):
        fit_context(model, small_settings(tmp_path, **changes, max_answer=128), print)


def test_the_paper_preset_fits_a_model_with_a_context_of_4096():
    settings = make_settings("paper", changes=[{"model": "m", "data": "d"}])
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096))
    fitted = fit_context(model, settings, print)
    assert fitted.of("max_prompt", "MeetingBank") == 4096 - 512
    assert fitted.of("max_prompt", "FOMC") == 1024
