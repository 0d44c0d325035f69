"""What people do with MoRAM through PEFT's, transformers' and TRL's own doors, from end to end."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
import trl
from peft import PeftModel, get_peft_model
from peft_support import config
from trace_support import TASKS as NAMES
from trace_support import make_tokenizer, write_data, write_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import moram
from moram import adapters
from moram.trainer import train_tasks

LOAD = """
import json, sys, torch, moram.peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
for ids in prompts:
    found = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    print(json.dumps(found[0].tolist()))
"""
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), hidden_size=64, num_key_value_heads=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Questions and answers, by task."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    found = {}
    for name in NAMES:
        rows = json.loads((folder / name / "train.json").read_text(encoding="utf-8"))
        found[name] = [{"prompt": r["prompt"], "completion": " " + r["answer"]} for r in rows]
    return found


def make_trainer(model, rows, folder):
    """TRL's trainer for texts, with its own settings but for these."""
    settings = trl.SFTConfig(
        folder,
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    data = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(model, settings, train_dataset=data, processing_class=TOKENIZER)


def prompts_of(tasks):
    return [TOKENIZER(rows[0]["prompt"])["input_ids"] for rows in tasks.values()]


@torch.no_grad()
def written(model, tasks):
    """What a model goes on with after a prompt of each task."""
    model.eval()
    ways = {"max_new_tokens": 6, "do_sample": False}
    return [model.generate(torch.tensor([p]), **ways)[0].tolist() for p in prompts_of(tasks)]


def score_on(tasks):
    """A function that gives minus the loss on a task's texts."""

    @torch.no_grad()
    def score(model, name):
        rows = [TOKENIZER(r["prompt"] + r["completion"])["input_ids"] for r in tasks[name]]
        ids = torch.tensor(rows)
        logits = model.eval()(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        return -float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))

    return score


def test_three_tasks_by_sft_are_loaded_by_peft_in_a_fresh_process(base, tasks, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = written(plain, tasks)
    torch.manual_seed(0)
    model = get_peft_model(plain, config(target_modules="llama"))
    found = train_tasks(model, tasks, make_trainer, score_on(tasks), tmp_path)
    assert {a.bank.num_frozen for a in adapters(model).values()} == {8}
    assert found.matrix[-1][-1] > found.matrix[0][-1] + 0.1
    expected = written(model, tasks)
    assert expected != before
    command = [sys.executable, "-c", LOAD, base, str(tmp_path / "adapters")]
    command += [json.dumps(prompts_of(tasks))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_sft_on_a_four_bit_base_leaves_the_atoms_in_their_own_precision(base, tasks, tmp_path):
    def quantised():
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"quantization_config": nf4, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(base, **options)

    torch.manual_seed(0)
    model = get_peft_model(quantised(), config(target_modules="llama"))
    kept = []

    def make(model, rows, folder):
        atoms = moram.parameters(model)
        kept.append([p.detach().clone() for p in atoms])
        return make_trainer(model, rows, folder)

    train_tasks(model, tasks, make, score_on(tasks), tmp_path)
    assert {p.dtype for p in moram.parameters(model)} == {torch.float32}
    # What the second task's atoms were when the third one's trainer was made is what froze.
    for index, adapter in enumerate(adapters(model).values()):
        assert torch.equal(adapter.bank.frozen_keys[4:8], kept[2][2 * index])
    loaded = PeftModel.from_pretrained(quantised(), tmp_path / "adapters")
    assert written(loaded, tasks) == written(model, tasks)
