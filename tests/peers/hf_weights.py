"""A model's weights as a Hugging Face folder: what both sides of a comparison can start from.

The format of safetensors is written by hand (a length, a header of JSON, the bytes), so that
nothing but PyTorch is needed.
"""

import json
import struct
from pathlib import Path

import torch
from torch import nn

from model import Model


def hugging_face_name(name: str) -> str:
    """The name of a parameter of `llama.Llama` in a checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def write(folder: Path, model: Model, module: nn.Module) -> None:
    """Writes `config.json` and fp32 `model.safetensors` into a new folder."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_base,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    header, chunks, offset = {}, [], 0
    for name, parameter in module.named_parameters():
        chunk = parameter.detach().float().cpu().contiguous().numpy().tobytes()
        header[hugging_face_name(name)] = {
            "dtype": "F32",
            "shape": list(parameter.shape),
            "data_offsets": [offset, offset + len(chunk)],
        }
        chunks.append(chunk)
        offset += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(chunks)


def read(folder: Path, module: nn.Module) -> None:
    """Fills a model with what [`write`] wrote."""
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    payload = memoryview(raw)[8 + length :]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            entry = header[hugging_face_name(name)]
            start, end = entry["data_offsets"]
            values = torch.frombuffer(bytearray(payload[start:end]), dtype=torch.float32)
            parameter.copy_(values.view(entry["shape"]))
