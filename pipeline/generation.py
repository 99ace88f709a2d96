"""Text that a model writes: greedy, temperature, top-k, top-p, up to end-of-text."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Return what the model writes after `prompt`; the global random state is left as it was.

    A temperature of 0 takes the likeliest token each time. An empty prompt starts a new document.
    Beyond the model's positions the text goes on from the last half of them.
    """
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            written = torch.cat(
                list(_pieces(model, tokenizer, prompt, max_new_tokens, settings))
                or [torch.tensor([])]
            )
    finally:
        model.train(was_training)
    return tokenizer.decode(written.long(), skip_special_tokens=True)


def _pieces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    settings: dict[str, float],
) -> Iterator[torch.Tensor]:
    """Yield runs of new ids, each as long as the positions left after its context allow."""
    positions = model.config.max_position_embeddings
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    context = torch.tensor([ids], device=model.device)
    if settings["temperature"] == 0:
        sampling = {"do_sample": False}
    else:
        sampling = {"do_sample": True, **settings}
    while max_new_tokens > 0:
        if context.shape[1] >= positions:
            context = context[:, -max(1, positions // 2) :]
        length = min(max_new_tokens, positions - context.shape[1])
        output = model.generate(
            input_ids=context,
            attention_mask=torch.ones_like(context),
            max_new_tokens=length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            use_cache=True,
            **sampling,
        )
        new = output[0, context.shape[1] :]
        yield new.cpu()
        if len(new) and new[-1] == tokenizer.eos_token_id:
            return
        max_new_tokens -= length
        context = output
