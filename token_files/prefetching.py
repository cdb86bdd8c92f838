"""Work in threads, ahead of the caller: reading and decoding overlap with what is done with the result."""
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def prefetch(function: Callable, items: Iterable, threads: int = 1) -> Iterator:
    """Yield function(item) for each item in order; meanwhile threads compute as many of the next ones."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            # at most one result more than threads is in memory; it comes out in the order of the items
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
