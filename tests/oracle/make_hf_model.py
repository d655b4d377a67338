"""Writes a tiny Hugging Face model folder by transformers' own save_pretrained.

    make_hf_model.py [--out DIR]     hf-tiny-5 under transformers 5.x, hf-tiny-4 under 4.x

The two releases write different layouts: 5.x `rope_parameters` and `dtype`, 4.x `rope_theta` and
`torch_dtype`. The two models differ too: hf-tiny-4 is untied and sharded with an index, hf-tiny-5
is tied and one file; RoPE base and the norms' epsilon are different. Beside each folder stand
`NAME.logits.safetensors` (tokens i64 [1, 64], logits f32 [1, 64, vocab] of the folder loaded again)
and `NAME.json` (texts and their token ids, and a greedy continuation).
"""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import counter_hash
import golden_io
import models
from models import TINY

MAJOR = int(transformers.__version__.split(".")[0])
NAME = f"hf-tiny-{MAJOR}"
END_OF_TEXT = "<|endoftext|>"

HF_TINY_4 = replace(
    TINY, vocab_size=300, hidden_size=48, intermediate_size=80, head_dim=8, max_positions=128
)
HF_TINY_5 = replace(HF_TINY_4, tied=True, rms_norm_eps=1e-6, rope_theta=500_000.0)
MODEL = HF_TINY_5 if MAJOR >= 5 else HF_TINY_4

CORPUS = [
    "The step reduces its gradients while the rest of the backward pass is still running.\n",
    "A rank keeps its part of the state; the others keep theirs.\n",
    "fn forward(&self, x: &Tensor) -> Result<Tensor> { self.weight.matmul(x) }\n",
    "for step in 0..steps { let loss = model.loss(&batch)?; optimizer.step(loss)?; }\n",
] * 4
TEXTS = [
    "The rest of the state is still running.",
    "fn step(&self) -> Result<Tensor> { }\n\n\ttabs and  spaces ",
    "Grüße, 世界! 🦀 \u0000 naïve café",
    f"one{END_OF_TEXT}two",
    "",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: 1 special token, 256 bytes and 43 merges."""
    raw = Tokenizer(tokenizer_models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=MODEL.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert raw.get_vocab_size() == MODEL.vocab_size
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END_OF_TEXT)


def greedy(hf: LlamaForCausalLM, prompt: list[int], count: int) -> tuple[list[int], float]:
    """`count` greedy tokens and the smallest lead of a winner over the runner-up."""
    ids, lead = list(prompt), float("inf")
    for _ in range(count):
        top = hf(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        lead = min(lead, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :], lead


def check_weights(folder: Path, hf: LlamaForCausalLM) -> None:
    """What was saved is what the counter hash says, and nothing else."""
    saved = {}
    for file in sorted(folder.glob("*.safetensors")):
        saved |= golden_io.read_tensors(file)
    assert saved.keys() == dict(hf.named_parameters()).keys(), sorted(saved)
    for name, value in saved.items():
        assert (value == counter_hash.weight(name, value.shape, MODEL.scales())).all(), name


@torch.no_grad()
def main() -> None:
    out = golden_io.out_folder(__doc__)
    folder = out / NAME
    folder.mkdir(exist_ok=True)
    built = models.build(MODEL).eval()
    built.save_pretrained(folder, max_shard_size="150KB" if MAJOR < 5 else "5GB")
    words = tokenizer()
    words.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    check_weights(folder, built)

    hf = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = models.pack(NAME, 1, 64, MODEL.vocab_size, 65, 65).tokens
    logits = hf(torch.from_numpy(tokens), use_cache=False).logits
    assert torch.equal(logits, built(torch.from_numpy(tokens), use_cache=False).logits)
    golden_io.write_tensors(
        out / f"{NAME}.logits.safetensors", {"tokens": tokens, "logits": logits.numpy()}
    )
    prompt = words.encode(TEXTS[0])
    continuation, lead = greedy(hf, prompt, 16)
    assert lead > 1e-3, f"the greedy continuation hangs on rounding: {lead}"
    golden_io.write_json(
        out / f"{NAME}.json",
        {
            "versions": models.versions(),
            "model": MODEL.json(),
            "logits_std": float(logits.std()),
            "texts": [{"text": text, "ids": words.encode(text)} for text in TEXTS],
            "greedy": {"prompt": prompt, "continuation": continuation},
        },
    )


if __name__ == "__main__":
    main()
