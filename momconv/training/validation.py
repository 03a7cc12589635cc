"""The scores on the held-out images at the end of an epoch, whatever they meet."""

from collections.abc import Callable

from momconv.data.decoding import UnreadableImage
from momconv.errors import OutOfMemory
from momconv.evaluation import Scores, evaluate
from momconv.exhaustion import naming_exhaustion
from momconv.training.memory import out_of_memory
from momconv.training.network import uncompiled
from momconv.training.omission import keep_rest, leave_out
from momconv.training.run import TrainingRun
from momconv.words import plural


def validate(
    run: TrainingRun, report: Callable[[int, str], None], check: Callable[[], None]
) -> Scores | None:
    """Return the scores on the held-out images; None without any.

    ``report`` is told what is being done, and ``check`` asked whether to go on, batch by batch.
    Without gradients an image needs less than in training, so the micro-batch should fit here too.

    Raises:
        OutOfMemory: Not even one image does.
        DataError: Too many images cannot be decoded any more.
    """
    if not run.splits.val.samples:
        return None

    def tell(done: int, total: int) -> None:
        report(0, f"validating {done}/{total}")
        if run.processes.count == 1:
            check()

    while True:
        size = min(run.evaluation_batch, run.plan.micro_batch)
        try:
            # Uncompiled, as in momconv eval.
            with (
                uncompiled(wanted=run.recipe.train.compile),
                run.processes.noticing_losses(),
                naming_exhaustion(),
            ):
                return evaluate(
                    run.networks[-1],
                    keep_rest(run).val,
                    batch_size=size,
                    device=run.device,
                    workers=run.workers,
                    precision=run.plan.precision if run.device.type == "cuda" else "fp32",
                    progress=tell,
                )
        except UnreadableImage as error:
            leave_out(run, "val", error)
            continue
        except OutOfMemory as error:
            if size == 1 or run.is_sharded:  # then others wait within the network
                doing = f"validating {plural(size, 'image')} at a time"
                raise out_of_memory(run, error, doing, "--device cpu") from None
            run.evaluation_batch = size // 2
        run.listener.tell(
            f"warning: {run.device} ran out of memory while validating {size} images at once; it "
            f"is done again, with {size // 2}"
        )
