"""This process, with one device."""

from concurrent.futures import Future

from redundancy_trace.cluster.jobs import Job, Scorer, Scoring, Watch, import_engine
from redundancy_trace.metrics import ModelScores


class Here:
    """One checkpoint at a time, by the thread that submits it: Ctrl-C ends it in the middle."""

    def __init__(self, device: str) -> None:
        """Take a device by name, as `--device` does."""
        self._device = device
        self._scorer: Scorer | None = None

    def count(self) -> int:
        """One."""
        return 1

    def dtype(self, name: str) -> str:
        """The compute dtype that a name stands for on the device."""
        from redundancy_trace.engine import choose_device, choose_dtype

        return str(choose_dtype(name, choose_device(self._device))).removeprefix("torch.")

    def start(self, scoring: Scoring) -> None:
        """Make the scorer, and import what it will need while the first checkpoint is on its way."""
        self._scorer = Scorer(scoring, self._device)
        import_engine()

    def submit(self, job: Job, watch: Watch) -> Future[ModelScores]:
        """Score a checkpoint now; the future is done when it is returned."""
        assert self._scorer is not None
        future: Future[ModelScores] = Future()
        try:
            future.set_result(self._scorer.score(job, watch))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing is at work."""
