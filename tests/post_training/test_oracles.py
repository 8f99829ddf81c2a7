"""TRL and PEFT compute the same losses and merges on the same weights and batches.

They need the extra ``oracle``: ``pip install --no-deps`` of its three packages beside the extra ``test`` is enough.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.interop import hugging_face
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops import IGNORED_TARGET
from moe_gpt.post_training.peft_folder import load_adapters, save_adapters
from moe_gpt.post_training.policy import leave_one_out_advantages, policy_loss, token_weights
from moe_gpt.post_training.preferences import bradley_terry_loss, dpo_loss, sequence_log_probs
from moe_gpt.post_training.reward_model import RewardModel
from moe_gpt.post_training.rollout import Rollout, score
from moe_gpt.training.adapters import adapters_of, add_adapters, merged

trl = pytest.importorskip("trl", reason="needs moe_gpt[oracle]")
peft = pytest.importorskip("peft", reason="needs moe_gpt[oracle]")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

SPECIAL = ("<|padding|>", "<|im_start|>", "<|im_end|>")
PAD = 1
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
PAIRS = [([20, 21, 22], [30, 31], [40]), ([23, 24], [33, 34, 35, 36], [43, 44]), ([25], [35], [45, 46, 47])]


@pytest.fixture(scope="module")
def ours() -> MoEGPT:
    """A tiny Mixtral."""
    return tiny_model(vocab_size=300).eval()


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    """The model for transformers, with a tokenizer whose padding is not its end."""
    path = tmp_path_factory.mktemp("oracle") / "model"
    hugging_face.save(ours, path, train_tokenizer(["some text to learn from"], 300, special_tokens=SPECIAL))
    return path


def tokenizer_of(folder):
    """Return the tokenizer with a plain chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def theirs_of(folder):
    """Return transformers' Mixtral in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def options(kind, folder, **settings):
    """Return a config of TRL that needs no accelerator and reports to nobody."""
    plain = {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "bf16": False}
    return kind(**plain, **settings, per_device_train_batch_size=4)


def prompt_only() -> datasets.Dataset:
    """Return a data set that a trainer wants but these tests never read."""
    return datasets.Dataset.from_dict({"prompt": ["some text"] * 4})


def padded(rows, length, left=False):
    """Return rows of ids and their mask."""
    fill = [[PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor([f + row if left else row + f for row, f in zip(rows, fill, strict=True)])
    return ids, ids != PAD


def equal(found, expected) -> None:
    """Compare two losses."""
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected).detach(), atol=1e-5, rtol=1e-5)


def test_supervised_fine_tuning(ours, folder):
    """The cross entropy of the tokens of answers."""
    data = datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "some"}] * 2] * 4})
    arguments = options(trl.SFTConfig, folder, max_length=32)
    trainer = trl.SFTTrainer(theirs_of(folder), arguments, train_dataset=data, processing_class=tokenizer_of(folder))
    trainer.aux_loss_enabled = False
    trainer.model.eval()
    rows = [prompt + answer for prompt, answer, _ in PAIRS]
    masks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer, _ in PAIRS]
    ids, valid = padded(rows, 6)
    labels = ids.masked_fill(~padded([[2 if m else PAD for m in mask] for mask in masks], 6)[1], IGNORED_TARGET)
    inputs = {"input_ids": ids, "attention_mask": valid.long(), "labels": labels}
    ce, _ = ours.cross_entropy(ids[:, :-1], labels[:, 1:])
    equal(ce.total / ce.n_valid, trainer.compute_loss(trainer.model, inputs))


def rollout_of_pairs(index: int) -> Rollout:
    """Return the chosen (1) or rejected (2) answers behind their prompts, padded on the left and the right."""
    ids, valid = padded([pair[0] for pair in PAIRS], 3, left=True)
    answers, mask = padded([pair[index] for pair in PAIRS], max(len(pair[index]) for pair in PAIRS))
    return Rollout(torch.cat([ids, answers], 1), torch.cat([valid, mask], 1), mask, torch.zeros(mask.shape))


def test_direct_preference_optimisation(ours, folder):
    """With a reference that differs from the policy."""
    torch.manual_seed(0)
    reference, their_reference = tiny_model(seed=1, vocab_size=300).eval(), folder.parent / "reference"
    hugging_face.save(reference, their_reference)
    data = datasets.Dataset.from_dict({"prompt": ["some"] * 4, "chosen": [" text"] * 4, "rejected": [" to"] * 4})
    arguments = options(trl.DPOConfig, folder, beta=0.1, loss_type="sigmoid")
    trainer = trl.DPOTrainer(
        theirs_of(folder), theirs_of(their_reference), arguments, train_dataset=data,
        processing_class=tokenizer_of(folder),
    )  # fmt: skip
    trainer.aux_loss_enabled = False
    trainer.model.eval()
    batch = trainer.data_collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS])
    sums = []
    for model in (ours, reference):
        for index in (1, 2):
            rollout = rollout_of_pairs(index)
            sums.append(sequence_log_probs(score(model, rollout).log_probs, rollout.is_answer))
    equal(dpo_loss(*sums, beta=0.1), trainer._compute_loss(trainer.model, batch, False))


def test_reward_model(ours, folder):
    """Bradley-Terry with a centre, on the score of the last token."""
    torch.manual_seed(0)
    reward = RewardModel.from_model(ours).eval()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    theirs.config.pad_token_id = PAD
    with torch.no_grad():
        theirs.score.weight.copy_(reward.output.weight)
    data = datasets.Dataset.from_dict({"chosen": ["some text"] * 4, "rejected": ["some"] * 4})
    arguments = options(trl.RewardConfig, folder, center_rewards_coefficient=0.01)
    trainer = trl.RewardTrainer(theirs, arguments, train_dataset=data, processing_class=tokenizer_of(folder))
    trainer.model.eval()
    batch = trainer.data_collator([{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in PAIRS])
    scores = [reward.scores(r.tokens, r.valid)[0] for r in map(rollout_of_pairs, (1, 2))]
    equal(bradley_terry_loss(*scores, center=0.01), trainer.compute_loss(trainer.model, dict(batch)))


def off_policy(ours):
    """Return a rollout, the policy's log-probabilities, those of its older self and of a reference, and advantages."""
    rollout = rollout_of_pairs(1)
    log_probs = score(ours, rollout).log_probs
    torch.manual_seed(0)
    old, reference = (log_probs.detach() + 0.3 * torch.randn_like(log_probs) for _ in range(2))
    return rollout, log_probs, old, reference, torch.tensor([1.0, -0.5, 0.25])


def their_batch(rollout, old, reference, advantages):
    """Return the same as TRL's inputs."""
    n = rollout.is_answer.shape[1]
    return {
        "prompt_ids": rollout.tokens[:, :-n],
        "prompt_mask": rollout.valid[:, :-n].long(),
        "completion_ids": rollout.answers,
        "completion_mask": rollout.is_answer.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": rollout.is_answer.sum(),
    }


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_group_relative_policy_optimisation(ours, folder, reduction, importance):
    """Off-policy, with clipping and with the KL times the ratio; the gradient at the output is the same too."""
    arguments = options(
        trl.GRPOConfig, folder, loss_type=reduction, beta=0.05, epsilon=0.2, num_generations=4, temperature=1.0,
        max_completion_length=7, importance_sampling_level=importance, use_bias_correction_kl=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        theirs_of(folder), lambda completions, **_: [0.0] * len(completions), arguments, prompt_only(),
        processing_class=tokenizer_of(folder),
    )  # fmt: skip
    trainer.aux_loss_enabled = False
    trainer.model.eval()
    ours.zero_grad()
    rollout, new, old, reference, advantages = off_policy(ours)
    theirs = trainer._compute_loss(trainer.model, their_batch(rollout, old, reference, advantages))
    mask = rollout.is_answer
    loss = policy_loss(
        new, old, advantages[:, None], mask, token_weights(mask, reduction, 7), clip=0.2, importance=importance,
        reference_log_probs=reference, kl_weight=0.05,
    )  # fmt: skip
    equal(loss, theirs)
    loss.backward()
    theirs.backward()
    equal(ours.output.weight.grad, trainer.model.lm_head.weight.grad)


def test_leave_one_out(ours, folder):
    """RLOO's ratio is that of the whole answer; so are its advantages those of the others' mean."""
    arguments = options(trl.RLOOConfig, folder, beta=0.05, epsilon=0.2, num_generations=4, max_completion_length=7)
    trainer = trl.RLOOTrainer(
        theirs_of(folder), lambda completions, **_: [0.0] * len(completions), arguments, prompt_only(),
        processing_class=tokenizer_of(folder),
    )  # fmt: skip
    trainer.aux_loss_enabled = False
    trainer.model.eval()
    rollout, new, old, reference, _ = off_policy(ours)
    advantages = leave_one_out_advantages([[1.0, 0.0, 0.5]])[0]
    mask = rollout.is_answer
    inputs = their_batch(rollout, old, reference, advantages) | {"old_logps": sequence_log_probs(old, mask)}
    weights = token_weights(mask, "grpo")
    loss = policy_loss(new, old, advantages[:, None], mask, weights, importance="trajectory")
    equal(loss, trainer._compute_loss(trainer.model, inputs))


@pytest.fixture
def tuned(folder, tmp_path):
    """PEFT's model with random adapters on attention and experts, and the folder in which PEFT saved them."""
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(theirs_of(folder), settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "theirs")
    return model.eval(), tmp_path / "theirs"


def test_an_adapter_of_peft_is_read_and_merged_as_peft_does(ours, tuned, tmp_path):
    """Logits before and after merging, and the merged weights."""
    theirs, adapter = tuned
    tokens = torch.tensor([[20, 21, 30, 31, 40, 45]])
    model = tiny_model(vocab_size=300).eval()
    load_adapters(model, adapter)
    logits = theirs(input_ids=tokens).logits
    assert (logits - ours(tokens).logits).abs().max() > 0.1
    equal(model(tokens).logits, logits)
    model = merged(model)
    both = theirs.merge_and_unload()
    equal(model(tokens).logits, both(input_ids=tokens).logits)
    both.save_pretrained(tmp_path / "merged")
    expected = hugging_face.load(tmp_path / "merged").state_dict()
    for name, tensor in model.state_dict().items():
        equal(tensor, expected[name])


def test_an_adapter_of_ours_is_read_by_peft(folder, tmp_path):
    """On top of the exported base model."""
    model = tiny_model(vocab_size=300).eval()
    add_adapters(model, 3, 6)
    for adapter in adapters_of(model).values():
        torch.nn.init.normal_(adapter.b, std=0.2)
    save_adapters(model, tmp_path / "ours", str(folder))
    theirs = peft.PeftModel.from_pretrained(theirs_of(folder), tmp_path / "ours").eval()
    tokens = torch.tensor([[20, 21, 30, 31, 40, 45]])
    equal(model(tokens).logits, theirs(input_ids=tokens).logits)
