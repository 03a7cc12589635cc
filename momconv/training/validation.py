"""The scores on the held-out images at the end of an epoch, whatever they meet."""

from collections.abc import Callable

from momconv.data.decoding import UnreadableImage
from momconv.errors import OutOfMemory
from momconv.evaluation import Scores, evaluate
from momconv.exhaustion import naming_exhaustion
from momconv.training.job import Job
from momconv.training.memory import out_of_memory
from momconv.training.network import uncompiled
from momconv.training.omission import keep_rest, leave_out
from momconv.training.progress import Progress


def validate(
    job: Job, progress: Progress, report: Callable[[int, str], None], check: Callable[[], None]
) -> Scores | None:
    """The scores on the held-out images; None without any.

    ``report`` is told what is being done, and ``check`` asked whether to go on, batch by batch.
    Without gradients an image needs less than in training, so the micro-batch should fit here too.

    Raises:
        OutOfMemory: Not even one image does.
        DataError: Too many images cannot be decoded any more.
    """
    if not job.splits.val.samples:
        return None

    def tell(done: int, total: int) -> None:
        report(0, f"validating {done}/{total}")
        if job.processes.count == 1:
            check()

    while True:
        size = min(job.evaluation_batch, job.plan.micro_batch)
        try:
            # Uncompiled, as in momconv eval.
            with (
                uncompiled(wanted=job.recipe.train.compile),
                job.processes.noticing_losses(),
                naming_exhaustion(),
            ):
                return evaluate(
                    job.networks[-1],
                    keep_rest(job.splits, progress).val,
                    batch_size=size,
                    device=job.device,
                    workers=job.workers,
                    precision=job.plan.setting.precision if job.device.type == "cuda" else "fp32",
                    progress=tell,
                )
        except UnreadableImage as error:
            leave_out(job, progress, "val", error)
            continue
        except OutOfMemory as error:
            if size == 1:
                doing = "validating 1 image at a time"
                raise out_of_memory(job, error, doing, "--device cpu") from None
            job.evaluation_batch = size // 2
        job.listener.tell(
            f"warning: {job.device} ran out of memory while validating {size} images at once; it "
            f"is done again, with {size // 2}"
        )
