"""Methods by name, and those without training: zero-shot and in-context learning."""

import re

import pytest
from torch import nn

from moram.continual import Example, Task
from moram.methods import METHODS, accepted_arguments, make_method
from moram.methods.in_context import HEADER
from moram.methods.registry import ENTRIES


def words(text):
    return len(text.split())


def test_in_context_prompt_is_the_published_text():
    ask = "Solve the following math problem.\n"
    train = tuple(Example(f"{ask}Question:\nq{i}\nAnswer:", f"{i}") for i in range(2))
    query = Example(f"{ask}Question:\nwhat\nAnswer:", "9")
    method = make_method("in-context", demonstrations=2)
    (prompt,) = method.prompts(Task("NumGLUE-ds", train, (query,)), words)
    shown = re.findall(r"q\d", prompt)
    assert sorted(shown) == ["q0", "q1"]
    assert prompt == (
        "Solve the following math problem.\n"
        "We will give you several examples and you should follow them to accomplish the task.\n"
        " Examples:\n"
        f"Question:\n{shown[0]}\nAnswer:{shown[0][1]}\n\n"
        f"Question:\n{shown[1]}\nAnswer:{shown[1][1]}\n\n"
        "Question:\nwhat\nAnswer:"
    )
    code = Task("Py150", (Example("<s> a <EOL>", "b"),), (Example("<s> c <EOL>", "d"),))
    assert make_method("in-context", demonstrations=1).prompts(code, words) == [
        f"Continue writing the code.\n{HEADER}Code:\n<s> a <EOL>b\n\nCode:\n<s> c <EOL>"
    ]
    meeting = Task("MeetingBank", train, (query,))
    assert method.prompts(meeting, words) == [query.prompt]


def test_in_context_demonstrations_keep_to_labels_room_and_never_show_the_query():
    test = tuple(Example(f"t{i:02} x", "ABC"[i % 3]) for i in range(12))
    train = tuple(Example(f"n{i:02} x", "ABC"[i % 3]) for i in range(12))
    task = Task("toy", train + (Example("much too long", "D"),) * 12, test)
    for source, letter in (("train", "n"), ("test", "t")):
        # 16 words of header, and half of the rest for 6 demonstrations of 3 words.
        method = make_method("in-context", source=source, max_length=16 + 2 * 6 * 3)
        for query, prompt in zip(test, method.prompts(task, words), strict=True):
            head, *shown, asked = prompt.removeprefix(HEADER).split("\n\n")
            shown = [head, *shown]
            assert asked == query.prompt and len(set(shown)) == 6
            assert all(line[0] == letter and line[:3] != query.prompt[:3] for line in shown)
            assert sorted(line[-1] for line in shown) == list("AABBCC")
    # As many different answers as demonstrations: none is repeated.
    names = tuple(Example(f"n{i} x", f"{i // 2}") for i in range(12))
    (prompt,) = make_method("in-context").prompts(Task("toy", names, test[:1]), words)
    assert sorted(re.findall(r"x(\d)", prompt)) == list("012345")
    with pytest.raises(ValueError, match="source must be one of train, test, got 'dev'"):
        make_method("in-context", source="dev")


@pytest.mark.parametrize("name", METHODS)
def test_what_command_lines_tell_of_a_method_without_importing_it_is_so(name):
    kind, entry = METHODS[name], ENTRIES[name]
    assert (kind.needs, kind.needs_task_id) == (entry.needs, entry.needs_task_id)


def test_methods_are_a_mapping_that_knows_their_names():
    assert len(METHODS) == len(list(METHODS)) == len({id(kind) for kind in METHODS.values()})
    assert "ewc" in METHODS and "fine-tuning" not in METHODS
    with pytest.raises(KeyError, match="fine-tuning"):
        _ = METHODS["fine-tuning"]


@pytest.mark.parametrize("name", ["zero-shot", "in-context"])
def test_methods_without_training_have_one_empty_stage_and_freeze_the_model(name):
    method, model = make_method(name), nn.Linear(2, 2)
    method.setup(model)
    assert method.stages(3) == [()]
    assert not any(p.requires_grad for p in model.parameters())
    assert method.stored_bytes(model) == 0 and method.needs_task_id == (name == "in-context")


def test_unknown_methods_and_arguments_are_named_with_the_closest():
    with pytest.raises(ValueError, match=r"got 'olora' \(closest: o-lora"):
        make_method("olora")
    with pytest.raises(
        ValueError, match=r"^ewc does not take lamb \(closest: lam\); it takes rank"
    ):
        make_method("ewc", lamb=1)
    with pytest.raises(ValueError, match=r"^zero-shot does not take rank; it takes no arguments$"):
        make_method("zero-shot", rank=1)
    with pytest.raises(ValueError, match="rank and atoms_per_task are the same setting"):
        make_method("moram", rank=1, atoms_per_task=2)
    assert {"rank", "alpha", "lam", "gamma"} <= set(accepted_arguments("ewc"))


def test_moram_takes_flat_settings():
    config = make_method("moram", rank=3, threshold=0.1, targets=("q",), seed=5).config
    assert (config.atoms_per_task, config.top_k, config.threshold) == (3, 3, 0.1)
    assert config.targets == ("q",)
    assert make_method("moram", rank=3, top_k=7).config.top_k == 7


def test_one_text_is_no_list_of_names_to_leave_out():
    for name in ("moram", "lora", "o-lora"):
        with pytest.raises(TypeError, match="exclude must be a tuple"):
            make_method(name, exclude="k_proj")
