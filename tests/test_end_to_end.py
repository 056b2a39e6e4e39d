"""End-to-end training: its data, its trainer, and the script on the smallest configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import end_to_end
import listops
import numpy as np
import pytest
import text
import workloads
from costs import flash_vjp
from optimizer import AdamW, Schedule
from trainer import Trainer, losses_of, own_memory
from transformer import Transformer
from workloads import WORKLOADS, stacked

from flash_cupy.gpu import why_no_gpu

TINY = WORKLOADS["tiny"]
ON_CPU = partial(flash_vjp, device="cpu")


# ---------------------------------------------------------------------------------------- the data


def test_masked_text_hides_and_asks_for_the_same_bytes() -> None:
    batch = next(workloads.masked_text_batches(100, 4, seed=1))
    plain, _ = next(text.batches(text.split(text.read_documents())[0], 4, 100, seed=1))
    assert batch.rows is not None
    assert batch.rows.shape == batch.targets.shape == (4 * 15,)
    assert len(set(batch.rows.tolist())) == 60
    np.testing.assert_array_equal(np.bincount(batch.rows // 100), [15] * 4)
    np.testing.assert_array_equal(batch.targets, plain.ravel()[batch.rows])
    changed = np.flatnonzero(batch.tokens.ravel() != plain.ravel())
    assert set(changed) <= set(batch.rows.tolist())
    hidden = (batch.tokens == text.VOCABULARY).sum()
    assert 40 <= hidden <= 56  # 80 % of 60
    assert batch.tokens.max() == text.VOCABULARY


def test_listops_batches_start_with_cls_and_repeat_in_another_order() -> None:
    batches = workloads.listops_batches(128, 4, seed=0, count=8)
    epoch = [next(batches) for _ in range(2)]
    for batch in epoch:
        assert batch.tokens.shape == (4, 128)
        assert (batch.tokens[:, 0] == listops.CLS).all()
        assert batch.tokens.max() < listops.VOCABULARY
        np.testing.assert_array_equal(batch.rows, [0, 128, 256, 384])
    again = [next(batches) for _ in range(2)]
    seen, seen_again = (sorted(bytes(t) for b in part for t in b.tokens) for part in (epoch, again))
    assert seen == seen_again
    once = list(workloads.listops_batches(128, 4, seed=0, count=8, endless=False))
    assert sorted(bytes(t) for b in once for t in b.tokens) == seen


@pytest.mark.parametrize("name", ["gpt2-small", "bert-large", "lra"])
def test_flops_are_six_a_parameter_and_token_and_those_of_attention(name: str) -> None:
    workload = WORKLOADS[name]
    model, seqlen, batch = workload.model, 512, 3
    short = workload.flops(seqlen, batch)
    attention = 12 * model.layers * seqlen * model.width * (0.5 if model.causal else 1)
    blocks = 6 * 12 * model.layers * model.width**2
    outputs = 6 * (model.classes or model.vocabulary) * model.width
    predictions = {"gpt2-small": 1536, "bert-large": 1536 * 0.15, "lra": 3}[name]
    expected = (attention + blocks) * seqlen * batch + outputs * predictions
    assert short == pytest.approx(expected, rel=1e-12)


def test_batches_keep_the_number_of_tokens() -> None:
    small = WORKLOADS["gpt2-small"]
    assert [small.batch_at(n) for n in (1024, 8192, 65536)] == [16, 2, 1]


# ------------------------------------------------------------------------------------- the trainer


def test_trainer_does_what_a_plain_loop_does() -> None:
    config, steps = TINY.at(16), 6
    data = stacked(TINY.batches(16, 4), steps)
    schedule = Schedule(1e-2, steps, warmup=2)
    trainer = Trainer(config, ON_CPU, data, schedule, np)
    for _ in range(steps):
        trainer.step()

    model = Transformer(config, ON_CPU)
    optimizer = AdamW(model.parameters.value, model.parameters.grad, model.parameters.matrix_size)
    losses = []
    for step in range(steps):
        losses.append(float(model.gradients(data.tokens[step], data.targets[step])))
        optimizer.step(schedule(step))
    np.testing.assert_array_equal(losses_of(trainer), losses)


@pytest.mark.parametrize("task", ["text", "masked text", "listops"])
def test_every_task_is_learned_from(task: str) -> None:
    sizes = {"vocabulary": 264, "classes": 16 if task == "listops" else 0, "causal": task == "text"}
    workload = replace(TINY, task=task, model=replace(TINY.model, **sizes))
    data = stacked(workload.batches(32, 4), 1)
    repeated = type(data)(*(None if x is None else np.repeat(x, 20, axis=0) for x in data))
    trainer = Trainer(workload.at(32), ON_CPU, repeated, Schedule(1e-2, 20, warmup=2), np)
    for _ in range(20):
        trainer.step()
    losses = losses_of(trainer)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.skipif(why_no_gpu() is not None, reason=f"no GPU: {why_no_gpu()}")
@pytest.mark.parametrize("name", ["flash", "dense"])
@pytest.mark.parametrize("mixed", [True, False])
def test_recorded_steps_do_what_the_others_do(name: str, mixed: bool) -> None:
    import cupy

    config, steps = replace(TINY.at(64), mixed=mixed), 12
    data = stacked(TINY.batches(64, 4), steps)
    schedule = Schedule(3e-3, steps, warmup=2)
    reference = Trainer(TINY.at(64), ON_CPU, data, schedule, np)
    initial = reference.model.parameters.value.copy()
    for _ in range(steps):
        reference.step()
    with own_memory(cupy):
        trainer = Trainer(config, end_to_end.attend_by(name, cupy), data, schedule, cupy)
        # With mixed precision the same seed draws other numbers.
        parameters = trainer.model.parameters
        parameters.value[...] = cupy.asarray(initial)
        parameters.work[...] = parameters.value.astype(parameters.work.dtype)
        for step in range(steps):
            if step == 4:
                trainer.record()
            trainer.step()
        losses = losses_of(trainer)
    tolerance = 2e-2 if mixed else 1e-4
    np.testing.assert_allclose(losses, losses_of(reference), rtol=tolerance)


# -------------------------------------------------------------------------------------- the script


def run(folder: Path, *options: str) -> dict:
    arguments = ["--config", "tiny", "--device", "cpu", "--output", str(folder), *options]
    assert end_to_end.main(arguments) == 0
    (path,) = folder.glob("*/end_to_end/tiny.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_script_adds_to_what_is_recorded(tmp_path: Path) -> None:
    first = run(tmp_path, "--steps", "8", "--attention", "dense")
    (record,) = first["records"]
    assert set(record["results"]) == {"dense"}
    second = run(tmp_path, "--steps", "8", "--attention", "flash")
    (record,) = second["records"]
    assert set(record["results"]) == {"dense", "flash"}
    assert record["largest_loss_difference"] < 1e-4
    assert record["ratios"]["dense"] > 0
    flash = record["results"]["flash"]
    assert len(flash["losses"]) == 8
    assert flash["losses"][-1] < flash["losses"][0]
    assert flash["tokens_per_second"] == pytest.approx(256e3 / flash["ms_per_step"])
    third = run(tmp_path, "--steps", "8", "--seqlen", "32")
    assert [r["seqlen"] for r in third["records"]] == [32, 64]
    assert len(list(tmp_path.glob("*/end_to_end/tiny-*.png"))) == 2


def test_running_out_of_memory_is_recorded() -> None:
    def fail() -> dict:
        raise MemoryError("3 TiB")

    assert end_to_end.attempt(fail) == {"failed": "MemoryError: 3 TiB"}


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main(["--steps", "3"])
    assert "--steps: got 3" in capsys.readouterr().err
