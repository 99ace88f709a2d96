"""GPT-2 written twice more, plainly: with nn.Linear as nanoGPT's, in NumPy as OpenAI's.

Nothing of `pipeline` and of transformers is used here.
"""

import math

import numpy as np
import torch
from torch import nn

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32}


class LinearGPT(nn.Module):
    """The architecture of a nanoGPT checkpoint, its parameters under the same names."""

    def __init__(self, *, vocab_size, block_size=16, bias=True, tanh=False, seed=0):
        super().__init__()
        width, self.tanh, self.heads = SIZES["n_embd"], tanh, SIZES["n_head"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, width),
                "wpe": nn.Embedding(block_size, width),
                "h": nn.ModuleList(self._block(width, bias) for _ in range(SIZES["n_layer"])),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.model_args = {
            **SIZES, "block_size": block_size, "bias": bias, "vocab_size": vocab_size,
            "dropout": 0.0,
        }  # fmt: skip
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))

    @staticmethod
    def _block(width, bias):
        def linear(inside, outside):
            return nn.Linear(inside, outside, bias=bias)

        attention = {"c_attn": linear(width, 3 * width), "c_proj": linear(width, width)}
        mlp = {"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)}
        norms = {name: nn.LayerNorm(width, bias=bias) for name in ("ln_1", "ln_2")}
        return nn.ModuleDict(
            {**norms, "attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)}
        )  # fmt: skip

    @torch.no_grad()
    def forward(self, ids):
        """Return the logits of ids [length], [length, vocabulary]."""
        parts, length = self.transformer, len(ids)
        x = parts["wte"](ids) + parts["wpe"](torch.arange(length))
        hidden = torch.ones(length, length).triu(1).bool()
        for block in parts["h"]:
            q, k, v = block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, dim=-1)
            seen = []
            for q_, k_, v_ in zip(*(t.chunk(self.heads, dim=-1) for t in (q, k, v)), strict=True):
                scores = (q_ @ k_.T / math.sqrt(q_.shape[-1])).masked_fill(hidden, -math.inf)
                seen.append(scores.softmax(-1) @ v_)
            x = x + block["attn"]["c_proj"](torch.cat(seen, dim=-1))
            inner = block["mlp"]["c_fc"](block["ln_2"](x))
            inner = nn.functional.gelu(inner, approximate="tanh" if self.tanh else "none")
            x = x + block["mlp"]["c_proj"](inner)
        return self.lm_head(parts["ln_f"](x))

    def checkpoint(self, *, prefix="", **args):
        """Return what nanoGPT's train.py gives to torch.save."""
        state = {prefix + name: tensor for name, tensor in self.state_dict().items()}
        optimizer = torch.optim.AdamW(self.parameters()).state_dict()
        return {
            "model": state, "optimizer": optimizer, "model_args": self.model_args | args,
            "iter_num": 100, "best_val_loss": torch.tensor(1.5), "config": {"out_dir": "out"},
        }  # fmt: skip


def tensorflow_variables(*, vocab_size, positions=16, seed=0):
    """Return the variables of an OpenAI checkpoint by name, float32, random."""
    width = SIZES["n_embd"]
    shapes = {"model/wte": (vocab_size, width), "model/wpe": (positions, width)}
    for layer in range(SIZES["n_layer"]):
        for name, inside, outside in (
            ("attn/c_attn", width, 3 * width), ("attn/c_proj", width, width),
            ("mlp/c_fc", width, 4 * width), ("mlp/c_proj", 4 * width, width),
        ):  # fmt: skip
            shapes[f"model/h{layer}/{name}/w"] = (1, inside, outside)
            shapes[f"model/h{layer}/{name}/b"] = (outside,)
    norms = [f"model/h{layer}/ln_{n}" for layer in range(SIZES["n_layer"]) for n in (1, 2)]
    for name in (*norms, "model/ln_f"):
        shapes |= {f"{name}/g": (width,), f"{name}/b": (width,)}
    source = np.random.default_rng(seed)
    return {n: 0.3 * source.standard_normal(s).astype("float32") for n, s in shapes.items()}


def tensorflow_logits(variables, ids):
    """Return the logits [length, vocabulary] in fp64."""
    values = {name: value.astype(np.float64) for name, value in variables.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * values[f"{name}/g"] + values[f"{name}/b"]

    def product(x, name):
        return x @ values[f"{name}/w"][0] + values[f"{name}/b"]

    length, size = len(ids), SIZES["n_embd"] // SIZES["n_head"]
    x = values["model/wte"][ids] + values["model/wpe"][:length]
    for layer in range(SIZES["n_layer"]):
        name = f"model/h{layer}"
        q, k, v = np.split(product(norm(x, f"{name}/ln_1"), f"{name}/attn/c_attn"), 3, axis=-1)
        seen = np.zeros_like(x)
        for query in range(length):
            for start in range(0, SIZES["n_embd"], size):
                part = slice(start, start + size)
                weights = np.exp(k[: query + 1, part] @ q[query, part] / math.sqrt(size))
                seen[query, part] = weights / weights.sum() @ v[: query + 1, part]
        x = x + product(seen, f"{name}/attn/c_proj")
        inner = product(norm(x, f"{name}/ln_2"), f"{name}/mlp/c_fc")
        inner = inner / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + product(inner, f"{name}/mlp/c_proj")
    return norm(x, "model/ln_f") @ values["model/wte"].T
