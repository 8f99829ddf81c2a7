"""The decoder's laws: causality, batch invariance, padding, initial weights, sharing, routers of one's own."""

import dataclasses
import math

import pytest
import torch
from tiny_models import (
    VARIANTS,
    VOCAB_SIZE,
    gradients_of,
    random_tokens,
    routers_of,
    run_and_record_choices,
    tiny_config,
    tiny_model,
    training_loss,
)
from torch import nn
from torch.testing import assert_close

from moe_gpt.config import ModelConfig
from moe_gpt.model.attention import Attention
from moe_gpt.model.cache import KVCache
from moe_gpt.model.experts import FeedForward
from moe_gpt.model.losses import IGNORED_TARGET
from moe_gpt.model.router import Router, Routing
from moe_gpt.model.transformer import Block, MoEGPT, RMSNorm
from moe_gpt.ops import Visible, rotary_angles

ROUNDING = {"atol": 1e-4, "rtol": 1e-4}
"""Logits have size 10 and are float32 sums whose order depends on the shapes; a leak changes them by 0.1."""


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_causal(variant):
    """Changing the future never changes the past: equal logits to rounding, equal expert choices."""
    model = tiny_model(**VARIANTS[variant])
    tokens, changed = random_tokens(2, 12), random_tokens(2, 12)
    changed[:, 7:] = (changed[:, 7:] + 1 + random_tokens(2, 5, seed=3)) % VOCAB_SIZE
    output, choices = run_and_record_choices(model, tokens)
    output_changed, choices_changed = run_and_record_choices(model, changed)
    assert_close(output_changed.logits[:, :7], output.logits[:, :7], **ROUNDING)
    assert torch.equal(choices_changed[:, :, :7], choices[:, :, :7])
    assert (output_changed.logits[:, 7:] - output.logits[:, 7:]).abs().amax(dim=(0, 2)).min() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_reads_every_earlier_token(variant):
    """The last position depends on the first token: causal is not blind."""
    model = tiny_model(**VARIANTS[variant])
    tokens, changed = random_tokens(1, 6), random_tokens(1, 6)
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB_SIZE
    assert (model(changed).logits[:, -1] - model(tokens).logits[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_gives_a_sequence_the_same_logits_alone_or_in_a_batch(variant):
    """Batch mates change nothing: equal logits to rounding, equal expert choices."""
    model = tiny_model(**VARIANTS[variant])
    tokens = random_tokens(5, 12)
    output, choices = run_and_record_choices(model, tokens)
    alone, choices_alone = run_and_record_choices(model, tokens[3:4])
    assert_close(alone.logits, output.logits[3:4], **ROUNDING)
    assert torch.equal(choices_alone, choices[:, 3:4])


def test_model_that_drops_is_causal_within_its_first_sequence():
    """With dropping, token-first order keeps the future of the first sequence out of its past."""
    model = tiny_model(capacity_factor=0.6)
    tokens, changed = random_tokens(1, 24), random_tokens(1, 24)
    changed[:, 10:] = random_tokens(1, 14, seed=3)
    output, output_changed = model(tokens), model(changed)
    assert output.router_stats.dropped_assignments.min() > 0
    assert_close(output_changed.logits[:, :10], output.logits[:, :10], **ROUNDING)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_no_logit_no_loss_no_count_and_no_gradient(variant, side):
    """A sequence padded on either side and masked is the sequence alone, whatever the padding's tokens are."""
    model = tiny_model(**VARIANTS[variant])
    tokens, targets = random_tokens(1, 9), random_tokens(1, 9, seed=2)
    place = slice(5, None) if side == "left" else slice(9)
    padded, valid_mask = random_tokens(1, 14, seed=3), torch.zeros(1, 14, dtype=torch.bool)
    padded_targets = torch.full((1, 14), IGNORED_TARGET)
    padded[:, place], padded_targets[:, place], valid_mask[:, place] = tokens, targets, True

    results = []
    for arguments, labels in (((tokens,), targets), ((padded, valid_mask), padded_targets)):
        model.zero_grad()
        output = model(*arguments)
        terms = training_loss(output, labels, model)
        terms.loss.backward()
        counts = output.router_stats.tokens_per_expert if output.router_stats else None
        results.append((output.logits, torch.stack(terms), counts, gradients_of(model)))
    alone, with_padding = results
    assert_close(with_padding[0][:, place], alone[0], **ROUNDING)
    assert_close(with_padding[1:], alone[1:], **ROUNDING)


def test_padding_of_several_lengths_in_a_batch_changes_nothing():
    """Sequences of lengths 12, 7 and 3 in one right-padded batch have the logits and counts they have alone."""
    model = tiny_model()
    tokens, lengths = random_tokens(3, 12), [12, 7, 3]
    valid_mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    batch = model(tokens, valid_mask)
    alone = [model(tokens[i : i + 1, :length]) for i, length in enumerate(lengths)]
    for i, length in enumerate(lengths):
        assert_close(batch.logits[i, :length], alone[i].logits[0], **ROUNDING)
    counts = sum(output.router_stats.tokens_per_expert for output in alone)
    assert torch.equal(batch.router_stats.tokens_per_expert, counts)


def test_padding_in_the_cache_changes_no_logit_and_is_not_counted():
    """A left-padded prompt and its continuation through a cache have the logits of the whole sequence alone."""
    model = tiny_model().eval()
    tokens = random_tokens(1, 10)
    padded = torch.cat([random_tokens(1, 4, seed=3), tokens], dim=1)
    valid_mask = torch.arange(14)[None] >= 4
    cache = KVCache(model.config, 1, 14, torch.device("cpu"), torch.float32)
    prompt = model(padded[:, :11], valid_mask[:, :11], cache)
    continued = model(padded[:, 11:], valid_mask, cache)
    assert_close(continued.logits, model(tokens).logits[:, 7:], **ROUNDING)
    assert prompt.router_stats.tokens_per_expert.sum(dim=1).tolist() == [14, 14]  # 7 tokens, 2 experts each
    assert continued.router_stats.tokens_per_expert.sum(dim=1).tolist() == [6, 6]


def test_model_without_valid_mask_equals_a_mask_of_all_tokens():
    """A mask that hides nothing changes nothing."""
    model = tiny_model()
    tokens = random_tokens(2, 9)
    plain, masked = model(tokens), model(tokens, torch.ones(2, 9, dtype=torch.bool))
    assert_close(masked.logits, plain.logits, **ROUNDING)
    assert_close(tuple(masked.router_stats), tuple(plain.router_stats), **ROUNDING)


def test_model_normalises_before_the_output():
    """With nothing added to the residual stream, logits are the output matrix times the normalised embedding."""
    model = tiny_model(n_experts=1, top_k=1)
    for block in model.blocks:
        nn.init.zeros_(block.attention.out.weight)
        nn.init.zeros_(block.feed_forward.down.weight)
    x = model.embedding.weight[random_tokens(2, 5)]
    normed = x / (x.square().mean(dim=-1, keepdim=True) + model.config.norm_eps).sqrt()
    assert_close(model(random_tokens(2, 5)).logits, normed @ model.output.weight.T, atol=1e-5, rtol=1e-4)  # float32


@pytest.mark.parametrize(("init_std", "tie_embeddings"), [(0.02, False), (0.02, True), (0.1, False)])
@pytest.mark.parametrize("n_experts", [1, 8])
def test_initial_loss_is_close_to_the_logarithm_of_the_vocabulary(n_experts, init_std, tie_embeddings):
    """The first loss is ln V plus half the variance of the logits, d_model · init_std²."""
    torch.manual_seed(0)
    shape = {"vocab_size": 500, "d_model": 64, "n_experts": n_experts, "top_k": min(2, n_experts)}
    model = MoEGPT(ModelConfig(**shape, init_std=init_std, tie_embeddings=tie_embeddings))
    tokens = torch.randint(500, (4, 65))
    ce = training_loss(model(tokens[:, :-1]), tokens[:, 1:], model).ce_loss
    # 256 targets with logits of standard deviation 8 · init_std: four standard errors are 2 · init_std
    assert_close(ce, torch.tensor(math.log(500) + 64 * init_std**2 / 2), atol=2 * init_std, rtol=0)


@pytest.mark.parametrize("n_experts", [1, 4])
def test_initial_weights_have_the_stated_standard_deviations(n_experts):
    """init_std everywhere, divided by sqrt(2 · n_layers) for the two projections into the residual stream."""
    torch.manual_seed(0)
    shape = {"d_model": 64, "d_ff": 64, "head_dim": 16, "n_layers": 8, "init_std": 0.08}
    model = MoEGPT(tiny_config(vocab_size=500, n_experts=n_experts, top_k=min(2, n_experts), **shape))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(64))
            continue
        into_residual = name.endswith(("attention.out.weight", "experts.down", "feed_forward.down.weight"))
        std = 0.08 / 4 if into_residual else 0.08
        expected_error = std / math.sqrt(2 * parameter.numel())
        assert abs(parameter.std() - std) < 5 * expected_error, name
        assert abs(parameter.mean()) < 5 * std / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_weights_are_a_function_of_the_seed(variant):
    """The same seed gives the same model, bit for bit; another seed another one."""
    one, same, other = (tiny_model(seed=seed, **VARIANTS[variant]).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["output.weight"], other["output.weight"])


def test_init_weights_makes_a_materialised_meta_model_the_same_model():
    """Built on the meta device, materialised and initialised, a model has the weights of one built directly."""
    with torch.device("meta"):
        model = MoEGPT(tiny_config(balance="bias", attention_sharing=2))
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    direct = MoEGPT(model.config)
    for one in (model, direct):
        torch.manual_seed(0)
        one.init_weights()
    assert_close(model.state_dict(), direct.state_dict(), atol=0, rtol=0)  # the same draws
    assert model.blocks[0].attention is model.blocks[1].attention


def test_init_weights_keeps_embeddings_tied_in_a_materialised_meta_model():
    """Materialising gives every module tensors of its own; after init_weights there is one matrix again."""
    with torch.device("meta"):
        model = MoEGPT(tiny_config(tie_embeddings=True))
    model.to_empty(device="cpu").init_weights()
    assert model.output.weight is model.embedding.weight


def test_attention_sharing_shares_parameters_between_consecutive_layers():
    """attention_sharing 2 of 4 layers: layers 0 and 1 are one attention, 2 and 3 another; norms are not shared."""
    model = tiny_model(n_layers=4, attention_sharing=2)
    first, second, third, fourth = model.blocks
    assert first.attention is second.attention
    assert third.attention is fourth.attention
    assert first.attention is not third.attention
    assert first.attention_norm is not second.attention_norm
    assert first.feed_forward is not second.feed_forward


@pytest.mark.parametrize(("sharing", "n_attentions"), [(1, 4), (2, 2), (4, 1)])
def test_attention_sharing_reduces_the_parameter_count(sharing, n_attentions):
    """Each group of layers has the parameters of one attention."""
    all_own, model = tiny_model(n_layers=4), tiny_model(n_layers=4, attention_sharing=sharing)
    saved = (4 - n_attentions) * n_parameters(Attention(model.config))
    assert n_parameters(all_own) - n_parameters(model) == saved


def test_attention_sharing_adds_up_the_gradients_of_the_layers():
    """The shared weights get the sum of the gradients that separate copies of them would get."""
    shared, copies = tiny_model(attention_sharing=2), tiny_model()
    copies.load_state_dict(shared.state_dict())  # a shared weight is in the state under each layer's name
    for model in (shared, copies):
        training_loss(model(random_tokens(2, 8)), random_tokens(2, 8, seed=2), model).loss.backward()
    separate = [block.attention.qkv.weight.grad for block in copies.blocks]
    assert_close(shared.blocks[0].attention.qkv.weight.grad, sum(separate), atol=1e-6, rtol=1e-4)  # float32 sums


def test_tied_embeddings_are_one_matrix():
    """tie_embeddings uses one V x D matrix at both ends and counts it once."""
    tied, untied = tiny_model(tie_embeddings=True), tiny_model()
    assert tied.output.weight is tied.embedding.weight
    assert untied.output.weight is not untied.embedding.weight
    assert n_parameters(untied) - n_parameters(tied) == VOCAB_SIZE * 32


def test_model_refuses_a_sequence_beyond_max_seq_len():
    """Too many tokens, in one call or after a cache that would have room, raise with the limit and the number."""
    model = tiny_model()
    with pytest.raises(ValueError, match="max_seq_len=32 tokens, got 33"):
        model(random_tokens(1, 33))
    cache = KVCache(model.config, 1, 40, torch.device("cpu"), torch.float32)
    model(random_tokens(1, 30), cache=cache)
    with pytest.raises(ValueError, match="room for 32 positions, got 33"):
        model(random_tokens(1, 3), cache=cache)
    assert model(random_tokens(1, 32)).logits.shape == (1, 32, VOCAB_SIZE)


def test_model_without_vocab_size_is_refused():
    """vocab_size None follows the tokenizer, and a model cannot be built before that is known."""
    with pytest.raises(ValueError, match=r"vocab_size must be a number.*None"):
        MoEGPT(tiny_config(vocab_size=None))


def test_dense_model_has_no_router_and_no_statistics():
    """One expert is a plain feed-forward network: no router in the state, router_stats None."""
    model = tiny_model(n_experts=1, top_k=1)
    assert model(random_tokens(2, 5)).router_stats is None
    assert not any("router" in name or "experts" in name for name in model.state_dict())
    assert all(isinstance(block.feed_forward, FeedForward) for block in model.blocks)


def test_router_stats_are_stacked_over_layers():
    """Losses (L,), counts (L, E) and dropped (L,); every layer counts N · K assignments."""
    stats = tiny_model(n_layers=3)(random_tokens(2, 8)).router_stats
    assert stats.load_balancing_loss.shape == stats.router_z_loss.shape == stats.dropped_assignments.shape == (3,)
    assert stats.tokens_per_expert.shape == (3, 4)
    assert stats.tokens_per_expert.sum(dim=1).tolist() == [32, 32, 32]


class RoundRobinRouter(nn.Module):
    """Sends token n to experts n and n + 1 with equal weights; not a subclass of Router."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_experts = config.n_experts

    def forward(self, x: torch.Tensor) -> Routing:
        """Ignore what the tokens are."""
        first = torch.arange(len(x)) % self.n_experts
        logits = torch.zeros(len(x), self.n_experts)
        indices = torch.stack([first, (first + 1) % self.n_experts], dim=1)
        return Routing(indices, torch.full((len(x), 2), 0.5), logits, logits.softmax(dim=-1))


class LastExpertsRouter(Router):
    """Chooses by the index of the expert, weighs by its probability."""

    def scores(self, x: torch.Tensor, router_probs: torch.Tensor) -> torch.Tensor:
        """Prefer the highest index."""
        return torch.arange(router_probs.shape[1]).float().expand_as(router_probs)


def test_model_takes_a_router_of_ones_own():
    """make_router may return any module whose forward gives a Routing."""
    model = MoEGPT(tiny_config(), make_router=RoundRobinRouter)
    stats = model(random_tokens(2, 8)).router_stats
    assert stats.tokens_per_expert.tolist() == [[8, 8, 8, 8]] * 2
    assert_close(stats.load_balancing_loss, torch.ones(2), atol=1e-6, rtol=0)  # float32 rounding


def test_model_takes_a_router_with_scores_of_its_own():
    """A subclass that overrides scores changes who is chosen, and is initialised like the original."""
    torch.manual_seed(0)
    model = MoEGPT(tiny_config(), make_router=LastExpertsRouter)
    assert model(random_tokens(2, 8)).router_stats.tokens_per_expert.tolist() == [[0, 0, 16, 16]] * 2
    assert all(0.1 < router.weight.std() < 0.3 for router in routers_of(model))  # init_std is 0.2


def test_rms_norm_by_hand():
    """(3, 4) has a root mean square of sqrt(12.5); the weight scales each coordinate."""
    norm = RMSNorm(2, eps=1e-12)
    nn.init.constant_(norm.weight, 2.0)
    expected = 2 * torch.tensor([3.0, 4.0]) / math.sqrt(12.5)
    assert_close(norm(torch.tensor([3.0, 4.0])), expected, atol=1e-6, rtol=0)  # float32 rounding


def test_rms_norm_adds_eps_to_the_mean_square():
    """With eps 3, a vector of ones is divided by sqrt(1 + 3)."""
    assert_close(RMSNorm(4, eps=3.0)(torch.ones(4)), torch.full((4,), 0.5), atol=1e-6, rtol=0)


def test_rms_norm_computes_in_float32_and_returns_the_type_it_was_given():
    """Values whose squares overflow float16 are normalised all the same."""
    y = RMSNorm(4, eps=1e-5)(torch.full((4,), 1000.0, dtype=torch.float16))
    assert y.dtype == torch.float16
    assert y.tolist() == [1, 1, 1, 1]


def test_block_without_projections_into_the_residual_is_the_identity():
    """A block is x + attention(...) + feed_forward(...): with both projections 0, x comes back as it was."""
    config = tiny_config(n_experts=1, top_k=1)
    block = Block(config, Attention(config), FeedForward(config))
    nn.init.zeros_(block.attention.out.weight)
    nn.init.zeros_(block.feed_forward.down.weight)
    x = torch.randn(2, 5, 32)
    y, routing = block(x, rotary_angles(torch.arange(5)[None], 8, 10_000.0), Visible(), None, 0)
    assert torch.equal(y, x)
    assert routing is None


def test_block_normalises_before_each_half():
    """Scaling the residual stream changes what a block adds only by the epsilon: both halves read normalised x."""
    config = dataclasses.replace(tiny_config(n_experts=1, top_k=1), norm_eps=1e-9)
    torch.manual_seed(0)
    block, rotary = MoEGPT(config).blocks[0], rotary_angles(torch.arange(5)[None], 8, 10_000.0)
    nn.init.zeros_(block.attention.out.weight)
    x = torch.randn(2, 5, 32)
    large, small = (block(scale * x, rotary, Visible(), None, 0)[0] - scale * x for scale in (10, 1))
    assert_close(large, small, atol=1e-5, rtol=1e-4)  # float32 rounding


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_documents_kept_apart_are_as_if_alone(variant):
    """Three documents packed into a row give the logits that each gives by itself, wherever it stands."""
    model = tiny_model(**VARIANTS[variant]).eval()
    lengths = [[5, 9, 6], [1, 18, 1], [20]]
    tokens = random_tokens(3, 20)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    packed = model(tokens, document_ids=ids).logits
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            alone = model(tokens[row : row + 1, start : start + size]).logits[0]
            torch.testing.assert_close(packed[row, start : start + size], alone, rtol=0, atol=1e-4)
            start += size


@torch.no_grad()
def test_documents_kept_apart_differ_from_documents_joined():
    """The mask matters; and it takes neither padding nor a cache beside it."""
    model = tiny_model().eval()
    tokens, ids = random_tokens(2, 12), torch.tensor([[0] * 6 + [1] * 6] * 2)
    assert (model(tokens, document_ids=ids).logits - model(tokens).logits)[:, 6:].abs().max() > 0.1
    with pytest.raises(ValueError, match="without padding and without a cache"):
        model(tokens, valid_mask=torch.ones(2, 12, dtype=torch.bool), document_ids=ids)
