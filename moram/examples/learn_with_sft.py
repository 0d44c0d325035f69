"""Teach a language model of four bits three tasks with TRL's SFTTrainer; prints R, percent.

python -m moram.examples.learn_with_sft
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from moram.peft import MoRAMPeftConfig
from moram.trainer import train_tasks

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"vocab_size": 64, "num_attention_heads": 4, "initializer_range": 0.3}
NF4 = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
# protect is this project's addition to the published rule, which it is without.
ADAPTER = MoRAMPeftConfig(target_modules="llama", atoms_per_task=4, top_k=4, protect=0.95)
NUMBERS = {"up": range(2, 22), "down": range(41, 21, -1), "twos": range(42, 62, 2)}
TEXTS = {name: " ".join(map(str, numbers)) for name, numbers in NUMBERS.items()}
TASKS = {name: Dataset.from_dict({"text": [text] * 128}) for name, text in TEXTS.items()}
WORDS = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, 64)}
SPLIT = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
SPLIT.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
TOKENS = hf.PreTrainedTokenizerFast(tokenizer_object=SPLIT, pad_token="<pad>", eos_token="<eos>")


def make_trainer(model: Any, texts: Any, out: str) -> SFTTrainer:
    """A task's trainer, which makes tokens of texts."""
    how = SFTConfig(out, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False)
    return SFTTrainer(model, how, train_dataset=texts, processing_class=TOKENS)


@torch.no_grad()
def score(model: Any, name: str) -> float:
    """Percent of a text's numbers that the model says after those before it."""
    ids = TOKENS(TEXTS[name], return_tensors="pt")["input_ids"]
    found = model.eval()(ids).logits.argmax(-1)
    return float(100 * (found[:, :-1] == ids[:, 1:]).float().mean())


def main() -> list[list[float]]:
    """R, as learned and as loaded again by PEFT alone."""
    torch.manual_seed(0)
    with TemporaryDirectory() as out:
        hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).save_pretrained(out)
        bases = [hf.LlamaForCausalLM.from_pretrained(out, quantization_config=NF4) for _ in "ab"]
        found = train_tasks(get_peft_model(bases[0], ADAPTER), TASKS, make_trainer, score, out)
        model = PeftModel.from_pretrained(bases[1], f"{out}/adapters")
        assert [score(model, name) for name in TASKS] == found.matrix[-1]
    return found.matrix


if __name__ == "__main__":
    print(main())
