"""Losses from chunks of logits are Hugging Face's own, and no more than a chunk is ever held.

pytest tests/engine/test_loss.py
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from tests.support.architectures import SOUND
from tests.support.kernels import flat, groups_of, kernel_sum, plain_sum, tiny_llama
from tests.support.training import VOCABULARY, tiny_model, tiny_users, write_tiny_store
from udp_ray.config.experiment import LoraConfig
from udp_ray.data.batches import NO_LOSS, Microbatch
from udp_ray.data.store import TokenStore
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.select import synthetic_group
from udp_ray.engine.loss import autocast_context, chunk_logits, row_losses
from udp_ray.models.lora import add_adapters

CPU = torch.device("cpu")
CHUNK = 6 * VOCABULARY  # two positions of three rows
TOKENS = 36  # three rows of 12

# Summed losses of a dozen tokens are near 50; float32 rounds each operation by 6e-8 of that.
ROUNDING = 3e-5

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip


def capped():
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0))


def scaled():
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25))


def divided():
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0))


def with_an_adapted_head():
    model = tiny_llama()
    add_adapters(model, LoraConfig(rank=2, target_modules=["q_proj", "lm_head"]), dropout=0.0)
    return model


class Doubled(GPT2LMHeadModel):
    """Changes its logits in a way that no setting tells of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def doubled():
    model = tiny_model()
    odd = Doubled(model.config)
    odd.load_state_dict(model.state_dict())
    return odd


KNOWN = {
    "gpt2": tiny_model, "llama": tiny_llama, "gemma": capped, "cohere": scaled,
    "granite": divided, "lora": with_an_adapted_head,
}  # fmt: skip


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def rows():
    """Three rows of 12, 9 and 5 tokens; the first 4 of the second are a prompt."""
    lengths, prompts = (12, 9, 5), (0, 4, 0)
    ids = torch.zeros(3, 12, dtype=torch.int64)
    labels = torch.full((3, 12), NO_LOSS)
    random = torch.Generator().manual_seed(4)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,), generator=random)
        labels[row, max(1, prompt) : length] = ids[row, max(1, prompt) : length]
    return Microbatch(ids, labels, torch.full((3,), 1 / 3))


def judged_sums(model, batch):
    """Each row by itself, unpadded, by the model's own loss."""
    sums = []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        length = 1 + int((labels != NO_LOSS).nonzero().max())
        loss = model(input_ids=ids[None, :length], labels=labels[None, :length]).loss
        sums.append(loss * int((labels != NO_LOSS).sum()))
    return torch.stack(sums)


def gradient(model, loss):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("chunk", [VOCABULARY, CHUNK, 2**25], ids=["one", "some", "all"])
@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_losses_and_gradients_are_those_of_each_row_by_itself(make, chunk):
    model = made(make).train()
    assert chunk_logits(model, microbatch_tokens=TOKENS, chunk_logits=chunk)
    weights = torch.tensor([1.0, 0.5, 2.0])  # as if rows of other groups were weighted otherwise
    sums, counts = row_losses(model, rows(), CPU)
    expected = judged_sums(model, rows())
    assert (sums - expected).abs().max() < ROUNDING
    assert counts.tolist() == [11, 5, 4]
    found, right = (gradient(model, (weights * each).sum()) for each in (sums, expected))
    assert (found - right).norm() < 1e-5 * right.norm()


def test_a_model_that_changes_its_logits_in_an_unknown_way_keeps_them_whole():
    model = doubled().train()
    assert not chunk_logits(model, microbatch_tokens=TOKENS, chunk_logits=CHUNK)
    sums, _ = row_losses(model, rows(), CPU)
    logits = model(input_ids=rows().input_ids).logits
    losses = cross_entropy(logits[:, :-1].mT, rows().labels[:, 1:], reduction="none")
    assert (sums - losses.sum(1)).abs().max() < ROUNDING
    plain = tiny_model()  # what its body and head alone would give
    chunk_logits(plain, microbatch_tokens=TOKENS, chunk_logits=CHUNK)
    assert (sums - row_losses(plain, rows(), CPU)[0]).abs().max() > 1000 * ROUNDING


def test_a_setting_that_the_model_does_not_heed_is_found_out():
    model = made(scaled)
    model.config.logit_scale = 0.5  # the model has taken its 0.25 already
    assert not chunk_logits(model, microbatch_tokens=TOKENS)


@pytest.mark.parametrize("name", SOUND)
def test_padding_on_the_right_changes_no_logits_before_it(name):
    """Without a mask, for architectures with positions learnt, rotary, or by distance (ALiBi)."""
    model = SOUND[name]()
    ids = synthetic_group(model, 1, 20).microbatches[0].input_ids
    for padding in (3, 28):
        padded = torch.nn.functional.pad(ids, (0, padding))
        with torch.no_grad():
            alone, found = model(input_ids=ids).logits, model(input_ids=padded).logits[:, :20]
        assert (found - alone).abs().max() < 1e-5 * alone.abs().max()


def attention_masks(model, batch, monkeypatch, **inputs):
    """What `scaled_dot_product_attention` is told to mask, call by call."""
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    if inputs:
        model(input_ids=batch.input_ids, **inputs)
    else:
        row_losses(model, batch, CPU)
    monkeypatch.undo()
    return masks


@pytest.mark.parametrize("chunk", [CHUNK, None])
@pytest.mark.parametrize("make", [tiny_model, tiny_llama])
def test_no_attention_mask_is_made_whoever_shares_the_batch(make, chunk, monkeypatch):
    """So the attention kernel is the same with and without padding in the batch."""
    model = make()
    if chunk is not None:
        chunk_logits(model, microbatch_tokens=TOKENS, chunk_logits=chunk)
    ragged = rows()
    even = Microbatch(ragged.input_ids[:1], ragged.labels[:1], torch.ones(1))
    for batch in (ragged, even):
        assert attention_masks(model, batch, monkeypatch) == [None, None]
    # The failing arm: a mask of the batch's padding, which the library drops where nothing is.
    has_mask = []
    for batch in (ragged, even):
        mask = (batch.labels != NO_LOSS).long()
        mask[:, 0] = 1
        masks = attention_masks(model, batch, monkeypatch, attention_mask=mask)
        has_mask.append([each is not None for each in masks])
    assert has_mask == [[True, True], [False, False]]


def head_calls(model, chunk):
    """The sizes of the logits that the head gave, and how many were ever alive at once."""
    chunk_logits(model, microbatch_tokens=TOKENS, chunk_logits=chunk)
    sizes, alive, most = [], [], 0

    def note(module, args, output):
        nonlocal most
        sizes.append(output.numel())
        alive.append(weakref.ref(output))
        most = max(most, sum(each() is not None for each in alive))

    handle = model.get_output_embeddings().register_forward_hook(note)
    sums, _ = row_losses(model.train(), rows(), CPU)
    num_forward = len(sizes)
    gradient(model, sums.sum())
    handle.remove()
    return sizes, num_forward, most


def test_one_chunk_of_logits_is_held_at_a_time_and_all_but_the_last_are_made_again():
    sizes, num_forward, most = head_calls(tiny_model(), CHUNK)
    assert max(sizes) <= CHUNK
    assert num_forward == 6  # 11 positions in twos
    assert len(sizes) == 6 + 5
    assert most == 1


def test_logits_that_fit_are_made_once_and_only_for_positions_with_loss():
    sizes, num_forward, _ = head_calls(tiny_model(), 2**25)
    assert (len(sizes), num_forward) == (1, 1)
    assert sizes == [3 * 11 * VOCABULARY]
    length = 40  # of which the first row needs 20 positions, and a multiple of 16 is kept
    ids = torch.arange(2 * length).reshape(2, length) % VOCABULARY
    labels = torch.full_like(ids, NO_LOSS)
    labels[0, 20:], labels[1, 5] = ids[0, 20:], ids[1, 5]
    long = tiny_llama()  # takes more tokens than the tiny GPT-2
    prompted = Microbatch(ids, labels, torch.full((2,), 1 / 2))
    assert chunk_logits(long, microbatch_tokens=TOKENS)
    seen = []
    long.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    sums, counts = row_losses(long, prompted, CPU)
    assert seen == [32]
    assert counts.tolist() == [20, 1]
    assert (sums - judged_sums(tiny_llama(), prompted)).abs().max() < ROUNDING


@pytest.mark.parametrize("kernel", ["direct", "ghost"])
@pytest.mark.parametrize("make", [tiny_model, tiny_llama])
def test_both_kernels_clip_as_a_plain_loop_over_users(kernel, make, tmp_path):
    store = TokenStore.open(write_tiny_store(tmp_path / "store"), verify=False)
    model = make()
    assert chunk_logits(model, microbatch_tokens=TOKENS, chunk_logits=CHUNK)

    def build(model, parameters):
        if kernel == "direct":
            return DirectKernel(model, parameters, clip_norm=0.1)
        return GhostKernel(model, parameters, clip_norm=0.1, microbatch_tokens=100)

    sums, _ = kernel_sum(build, model, groups_of(store, range(6)))
    expected = plain_sum(tiny_users(24, seed=1)[:6], 0.1, make())
    assert (flat(sums) - expected).abs().max() < 1e-6


def test_under_autocast_chunks_are_as_rough_as_the_whole():
    model = tiny_llama()
    with autocast_context("bfloat16", CPU):
        whole, _ = row_losses(model, rows(), CPU)
        chunk_logits(model, microbatch_tokens=TOKENS, chunk_logits=CHUNK)
        chunked, _ = row_losses(model, rows(), CPU)
    exact, _ = row_losses(model, rows(), CPU)
    assert (chunked - whole).abs().max() < ROUNDING
    assert (whole - exact).abs().max() > ROUNDING


def test_how_a_row_is_cut_does_not_depend_on_the_rows_beside_it():
    """Bit for bit also under autocast, where another shape of a product may round otherwise."""
    model = tiny_llama().train()
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCABULARY, (4, 48), generator=random)
    labels = ids.clone()
    labels[:, 0] = NO_LOSS
    labels[1:, :40] = NO_LOSS  # the others carry less loss than the first
    chunk_logits(model, microbatch_tokens=4 * 48, chunk_logits=2 * 16 * VOCABULARY)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with autocast_context("bfloat16", CPU):
        for rows_kept in (slice(0, 4), slice(0, 1), slice(0, 2)):
            kept = ids[rows_kept]
            batch = Microbatch(kept, labels[rows_kept], torch.ones(len(kept)))
            row_losses(model, batch, CPU)
    assert seen == 3 * [16, 16, 15]


@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_where_ranks_gather_the_head_together_it_is_called_equally_often_for_any_rows(autocast):
    model = tiny_llama().train()
    calls = []
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append(1))

    def losses(chunk, row_tokens, shape):
        chunk_logits(
            model, microbatch_tokens=4 * 48, chunk_logits=chunk * VOCABULARY, even_for=row_tokens
        )
        calls.clear()
        ids = torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(5))
        labels = ids.masked_fill(torch.arange(shape[1]) < 1, NO_LOSS)
        batch = Microbatch(ids, labels, torch.ones(shape[0]))
        with autocast_context(autocast, CPU):
            sums, _ = row_losses(model, batch, CPU)
        return sums.detach(), len(calls)

    shapes = [(4, 48), (2, 48), (6, 30), (1, 17), (3, 2)]
    even = [losses(40, 48, shape) for shape in shapes]
    assert len({number for _, number in even}) == 1
    assert even[0][1] == (3 if autocast == "bfloat16" else 5)
    assert len({losses(40, None, shape)[1] for shape in shapes}) > 1
    for (sums, _), shape in zip(even, shapes, strict=True):
        whole, _ = losses(10_000, None, shape)
        assert torch.allclose(sums, whole, rtol=1e-2 if autocast == "bfloat16" else 1e-5)
