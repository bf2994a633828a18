"""Stage I: resuming, the curriculum, and what packing must not do."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from ouro_runtime.training.data import ChatSource, Curriculum
from ouro_runtime.training.model import LoopLM, LoopLMConfig
from ouro_runtime.training.recipe import Recipe
from ouro_runtime.training.stage1 import Budget, Stage1, token_losses

CPU = torch.device("cpu")


def assert_same(one: Stage1, other: Stage1) -> None:
    assert one.step == other.step and one.tokens == other.tokens
    assert one.curriculum.state() == other.curriculum.state()
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    for a, b in zip(one.opts, other.opts, strict=True):
        for x, y in zip(a.state.values(), b.state.values(), strict=True):
            assert x.keys() == y.keys()
            assert all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x)


def test_killed_and_resumed_equals_uninterrupted(
    recipe: Recipe, tok: Tokenizer, tmp_path: Path
) -> None:
    whole = Stage1(recipe, tok, CPU)
    whole.run(Budget(steps=12), None)

    class KilledError(Exception):
        pass

    class Dying(Stage1):
        def train_step(self, progress: float) -> None:
            if self.step == 8:
                raise KilledError
            super().train_step(progress)
            if self.step == 5:
                self.save(tmp_path / "stage1.pt")

    with pytest.raises(KilledError):
        Dying(recipe, tok, CPU).run(Budget(steps=12), None)
    resumed = Stage1(recipe, tok, CPU)
    torch.manual_seed(99)  # resuming must not depend on the process's own generator
    resumed.load(tmp_path / "stage1.pt")
    assert resumed.step == 5, "steps 6 to 8 were never saved"
    resumed.run(Budget(steps=12), tmp_path / "stage1.pt")
    assert_same(resumed, whole)


def test_seed_decides_the_weights(recipe: Recipe, tok: Tokenizer) -> None:
    one, other = Stage1(recipe, tok, CPU), Stage1(recipe, tok, CPU)
    for trainer in (one, other):
        trainer.run(Budget(steps=3), None)
    assert_same(one, other)


def test_training_lowers_the_loss_of_every_loop(recipe: Recipe, tok: Tokenizer) -> None:
    trainer = Stage1(recipe, tok, CPU)
    batch = trainer.source.batch(random.Random("fixed"), 4, 128)

    def losses() -> torch.Tensor:
        states = trainer.model(batch.ids, batch.bias, batch.pick)
        return token_losses(trainer.model, states, batch.target)[0].mean(1)

    before = losses()
    trainer.run(Budget(steps=60), None)
    after = losses()
    assert (after < 0.6 * before).all(), (before, after)


def test_curriculum_rises_only_on_its_present_level() -> None:
    c = Curriculum(min_seen=20)
    for _ in range(200):
        c.record("sum", 3, True)
    assert c.levels["sum"] == 0
    for _ in range(20):
        c.record("sum", 0, True)
    assert c.levels["sum"] == 1 and c.seen["sum"] == 0
    for _ in range(200):
        c.record("sum", 1, False)
    assert c.levels["sum"] == 1


def test_curriculum_stops_at_the_top() -> None:
    c = Curriculum(min_seen=1, pass_rate=0.0)
    for _ in range(50):
        for level in range(9):
            c.record("cups", level, True)
    assert c.levels["cups"] == c.tops["cups"]


def test_packed_conversations_do_not_see_each_other(tok: Tokenizer, recipe: Recipe) -> None:
    """Answers' states are those of the conversation alone at position 0."""
    torch.manual_seed(0)
    model = LoopLM(LoopLMConfig(recipe.vocab_size, 64, 96, 1, 2))
    source = ChatSource(tok, Curriculum())
    batch = source.batch(random.Random(0), 2, 128)
    packed = model(batch.ids, batch.bias, batch.pick)
    rows = batch.ids.shape[1]
    checked = 0
    for r in range(2):
        starts = [i for i in range(rows) if batch.bias[r, 0, i, :i].lt(0).all()]
        for start, end in zip(starts, [*starts[1:], rows], strict=True):
            ids = batch.ids[r : r + 1, start:end]
            bias = torch.full((end - start, end - start), -1e9).triu(1)
            alone = model(ids, bias[None, None])[:, 0]
            for n, p in enumerate(batch.pick.tolist()):
                if r * rows + start <= p < r * rows + end:
                    at = p - r * rows - start
                    torch.testing.assert_close(packed[:, n], alone[:, at], atol=2e-5, rtol=1e-4)
                    checked += 1
    assert checked == len(batch.pick)


def test_targets_are_the_answers(tok: Tokenizer) -> None:
    batch = ChatSource(tok, Curriculum()).batch(random.Random(4), 4, 128)
    flat = batch.ids.flatten()
    assert torch.equal(flat[batch.pick + 1], batch.target)
    for _, _, start, end in batch.spans:
        assert batch.target[end - 1] == 2, "an answer ends with <|im_end|>"
        assert not (batch.target[start : end - 1] == 2).any()


def test_thresholds_are_drawn_for_generated_positions_alone(tok: Tokenizer) -> None:
    batch = ChatSource(tok, Curriculum()).batch(random.Random(3), 4, 128)
    drawn = batch.thresholds(random.Random(4), full=0.0).flatten()
    generated = torch.zeros(4 * 128, dtype=torch.bool)
    for _, _, start, end in batch.spans:
        assert drawn[batch.pick[start]] == 1, "the last prompt position runs every loop"
        generated[batch.pick[start + 1 : end]] = True
    assert generated.any()
    assert (drawn[generated] < 1).all() and (drawn[~generated] == 1).all()
    assert (batch.thresholds(random.Random(4), full=1.0) == 1).all()
