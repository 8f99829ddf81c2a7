"""Generation: the cache changes nothing, sampling by hand, seeds, where it stops, what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from moe_gpt import ops
from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.inference.generate import generate
from moe_gpt.inference.sampling import SamplingConfig, next_token_probs
from moe_gpt.model.cache import KVCache
from moe_gpt.model.transformer import MoEGPT

GREEDY = SamplingConfig(temperature=0)
PROMPT = [3, 1, 4, 1, 5]
VARIANTS = {
    "multi_query": {},
    "grouped_query": {"n_kv_heads": 2},
    "shared_attention": {"attention_sharing": 2},
    "balance_by_bias": {"balance": "bias"},
    "noise_and_dropping_in_training": {"router_noise": 1.0, "capacity_factor": 0.5},
    "dense": {"n_experts": 1, "top_k": 1},
}


def tiny_model(**changes: object) -> MoEGPT:
    """Return a model whose weights are large enough to make its predictions differ."""
    shape = {"vocab_size": 61, "n_layers": 2, "d_model": 32, "n_heads": 4, "head_dim": 8, "d_ff": 16, "n_experts": 4}
    torch.manual_seed(0)
    model = MoEGPT(ModelConfig(**(shape | {"max_seq_len": 24, "init_std": 0.2} | changes)))
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return model


def greedy_without_cache(model: MoEGPT, prompt: list[int], n_tokens: int) -> list[int]:
    """Continue by running the model on the whole text for every token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(params=["plain", "cpu", "cuda"])
def way_to_compute(request):
    """Run the test with every way to compute."""
    with ops.using(request.param):
        yield


@pytest.mark.usefixtures("way_to_compute")
@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_with_cache_equals_decoding_without(variant):
    """Cached greedy decoding gives the tokens of running the whole text again for every token."""
    model = tiny_model(**VARIANTS[variant]).eval()
    expected = greedy_without_cache(model, PROMPT, 15)
    assert list(generate(model, PROMPT, 15, GREEDY)) == expected
    assert len(set(expected)) > 1  # not one token over and over


@pytest.mark.usefixtures("way_to_compute")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunks", [[5, 7], [1, 1, 10], [11, 1]], ids=str)
def test_a_prompt_fed_in_chunks_through_a_cache_gives_the_logits_of_one_pass(variant, chunks):
    """However a text is cut, the cache continues it: same logits to rounding, for every sequence of a batch."""
    model = tiny_model(**VARIANTS[variant]).eval()
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, 12, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in tokens.split(chunks, dim=1)]
        expected = model(tokens).logits
    assert cache.length == 12
    assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)  # float32 products of other shapes


def test_generate_is_reproducible_by_its_seed():
    """The same seed gives the same text, another seed another one."""
    model = tiny_model()
    one, same, other = (list(generate(model, PROMPT, 15, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_generate_leaves_torchs_random_state_alone():
    """Sampling draws from a generator of its own, and torch's global one does not influence it."""
    model = tiny_model()
    before = torch.get_rng_state()
    one = list(generate(model, PROMPT, 10, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert list(generate(model, PROMPT, 10, seed=1)) == one


def test_generate_draws_from_next_token_probs():
    """Over many seeds the first token's frequencies are its probabilities."""
    model, sampling = tiny_model().eval(), SamplingConfig(temperature=2.0, top_k=5)
    with torch.no_grad():
        probs = next_token_probs(model(torch.tensor([PROMPT])).logits[:, -1], [sampling])[0]
    draws = [next(generate(model, PROMPT, 1, sampling, seed=seed)) for seed in range(400)]
    frequencies = torch.bincount(torch.tensor(draws), minlength=61) / 400
    assert_close(frequencies, probs, atol=0.1, rtol=0)  # four standard errors of 400 draws
    assert (frequencies[probs == 0] == 0).all()
    assert (frequencies > 0.02).sum() > 1


def test_generate_stops_at_end_of_text_without_yielding_it():
    """What comes before end-of-text is yielded, the token itself and everything after it is not."""
    model = tiny_model()
    text = list(generate(model, PROMPT, 15, GREEDY))
    end_of_text_id = next(token for token in text if text.index(token) >= 2)
    stopped = list(generate(model, PROMPT, 15, GREEDY, end_of_text_id=end_of_text_id))
    assert stopped == text[: text.index(end_of_text_id)]
    assert len(stopped) >= 2


@pytest.mark.parametrize(("n_prompt", "max_new_tokens", "n_made"), [(5, 7, 7), (5, 100, 19), (23, 100, 1), (5, 0, 0)])
def test_generate_stops_at_the_number_asked_for_or_when_the_context_is_full(n_prompt, max_new_tokens, n_made):
    """Prompt and answer together never exceed max_seq_len, here 24, and reach it where enough is asked for."""
    made = list(generate(tiny_model(), [7] * n_prompt, max_new_tokens))
    assert len(made) == n_made


@pytest.mark.parametrize(("n_prompt", "message"), [(0, "at least one token, got none"), (24, "24 tokens, got 24")])
def test_generate_refuses_a_prompt_that_is_empty_or_fills_the_context(n_prompt, message):
    """There must be a token to start from and room for one more."""
    with pytest.raises(InputError, match=message):
        next(generate(tiny_model(), [7] * n_prompt, 5))


@pytest.mark.parametrize("was_training", [True, False])
@pytest.mark.parametrize("ending", ["exhausted", "closed early", "failed"])
def test_generate_restores_the_mode_of_the_model(was_training, ending):
    """Evaluation mode lasts as long as the generation, however it ends."""
    model = tiny_model().train(was_training)
    texts = generate(model, [99] if ending == "failed" else PROMPT, 5)  # 99 is no token
    if ending == "exhausted":
        list(texts)
    elif ending == "closed early":
        next(texts)
        assert not model.training
        texts.close()
    else:
        with pytest.raises(IndexError):
            next(texts)
    assert model.training is was_training


def test_generate_builds_no_graph():
    """Generation needs no gradients and leaves none behind."""
    model, needs_gradient = tiny_model(), []
    model.output.register_forward_hook(lambda _module, _inputs, logits: needs_gradient.append(logits.requires_grad))
    list(generate(model, PROMPT, 3))
    model(torch.tensor([PROMPT])).logits.sum().backward()  # and training goes on afterwards
    assert needs_gradient == [False, False, False, True]


@pytest.mark.parametrize("converted", [False, True], ids=["autocast", "bf16_weights"])
def test_generate_runs_in_bf16(converted):
    """Generation works under autocast and with a model converted to bf16."""
    model = tiny_model().bfloat16() if converted else tiny_model()
    assert len(list(generate(model, PROMPT, 4, precision="fp32" if converted else "bf16"))) == 4
