"""How an update is divided over processes and batches."""

from pipeline.recipe import InputError


def share_of_update(
    tokens_per_update: int, *, block_size: int, batch_size: int, world_size: int
) -> tuple[int, int]:
    """Return how many rows each process takes at once, and how often in one update.

    `batch_size` is the most that it takes at once: where so many processes share an update that
    each has fewer rows, it takes these.

    Raises:
        InputError: it does not come out even; the nearest budgets that do are named.
    """
    row, batch = block_size * world_size, block_size * batch_size * world_size
    size, named = batch, f"training.per_device_train_batch_size {batch_size} x "
    if tokens_per_update < batch:
        size, named = row, ""
    count, rest = divmod(tokens_per_update, size)
    if rest or not count:
        nearest = sorted({max(1, count) * size, (count + 1) * size})
        raise InputError(
            f"tokens_per_update is {tokens_per_update}, which is not a multiple of data.block_size "
            f"{block_size} x {named}{world_size} process(es) = {size}; the nearest that are: "
            f"{' and '.join(str(n) for n in nearest)}"
        )
    return (batch_size, count) if size == batch else (count, 1)
