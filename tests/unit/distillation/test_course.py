"""A run in two parts: resumed anywhere, with exact public steps and private ones that never repeat noise."""

from collections.abc import Callable
from pathlib import Path

import private_world
import pytest
import tiny_models
import torch

from ebbflow.cloud.distillation import corpus, private_noise
from ebbflow.cloud.distillation.checkpoint import Checkpoints
from ebbflow.cloud.distillation.course import Course
from ebbflow.cloud.distillation.mixture import Documents, Sequences
from ebbflow.cloud.distillation.private_training import PrivateTrainer
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.cloud.distillation.trainer import Progress, Trainer
from ebbflow.common.student.model import Student

RECIPE = Recipe(steps=3, batch_size=2, sequence_length=16, learning_rate=3e-3, kl_weight=0.0)
PRIVATE_STEPS = 4
MakeCourse = Callable[..., Course]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def make_course() -> MakeCourse:
    tokenizer = tiny_models.tokenizer()
    documents = Documents.encode(corpus.parse(tiny_models.corpus_lines(10)).split("train"), tokenizer)

    def make(rank: int = 0, documents: Documents = documents) -> Course:
        student = private_world.student(vocab_size=tokenizer.size)
        sequences = Sequences(documents, {}, length=RECIPE.sequence_length, count=RECIPE.sequences, seed=0)
        private = private_world.recipe(steps=PRIVATE_STEPS, rank=rank)
        texts = private_world.texts(8)
        return Course(
            Trainer(student, sequences, RECIPE, None),
            lambda student: PrivateTrainer(student, texts, private, 1.0),
            RECIPE.steps,
            PRIVATE_STEPS,
        )

    return make


class _Killed(Exception):
    pass


def _run_until(course: Course, step: int, checkpoints: Checkpoints) -> None:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            checkpoints.save(course.state())
            raise _Killed

    with pytest.raises(_Killed):
        course.run(on_step)


def _weights(student: Student) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("stop_after", range(1, 8))
def test_a_run_goes_on_after_any_step_and_ends_as_an_ordinary_student(
    stop_after: int, rank: int, make_course: MakeCourse, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, "run")
    _run_until(make_course(rank), stop_after, checkpoints)
    resumed, told = make_course(rank), list[Progress]()
    state = checkpoints.load()
    assert state is not None
    resumed.load_state(state)
    assert resumed.step == stop_after
    resumed.run(told.append)
    assert [progress.step for progress in told] == list(range(stop_after + 1, 8))
    assert {progress.steps for progress in told} <= {7}
    assert resumed.step == 7
    assert set(resumed.student.state_dict()) == set(private_world.student(vocab_size=320).state_dict())
    assert all(tensor.isfinite().all() for tensor in resumed.student.state_dict().values())


def test_public_steps_are_the_same_again_and_private_ones_are_not(make_course: MakeCourse, tmp_path: Path) -> None:
    public, private = Checkpoints(tmp_path / "public", "run"), Checkpoints(tmp_path / "private", "run")
    first = make_course()
    _run_until(first, 3, public)
    second = make_course()
    _run_until(second, 3, public)
    before = _weights(second.student)
    assert all(torch.equal(a, b) for a, b in zip(_weights(first.student).values(), before.values(), strict=True))
    ends = []
    for _ in range(2):
        course = make_course()
        state = public.load()
        assert state is not None
        course.load_state(state)
        _run_until(course, 4, private)
        ends.append(_weights(course.student))
    assert all(not torch.equal(ends[0][name], ends[1][name]) for name in before)


@pytest.mark.parametrize("stops", [(4,), (4, 5), (5, 5, 6), (4, 4, 4)])
def test_a_run_that_is_killed_and_resumed_never_adds_the_same_noise_again(
    stops: tuple[int, ...], make_course: MakeCourse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its state is restored from an older checkpoint, and whatever torch's generator is set to."""
    drawn: list[bytes] = []
    keys: list[bytes] = []
    real = private_noise.gaussian
    stream = private_noise.Keystream.__init__

    def note(count: int, std: float) -> torch.Tensor:
        noise = real(count, std)
        drawn.append(noise.numpy().tobytes())
        return noise

    def key(self: private_noise.Keystream) -> None:
        stream(self)
        keys.append(self.words(4).tobytes())

    monkeypatch.setattr(private_noise, "gaussian", note)
    monkeypatch.setattr(private_noise.Keystream, "__init__", key)
    checkpoints = Checkpoints(tmp_path, "run")
    oldest = Checkpoints(tmp_path / "old", "run")
    _run_until(make_course(), 3, oldest)
    for number, stop in enumerate(stops):
        torch.manual_seed(0)
        course = make_course()
        state = (checkpoints if number % 2 else oldest).load()
        assert state is not None
        course.load_state(state)
        if course.step < stop:
            _run_until(course, stop, checkpoints)
    torch.manual_seed(0)
    course = make_course()
    state = oldest.load()
    assert state is not None
    course.load_state(state)
    course.run(lambda _: None)
    assert len(drawn) > PRIVATE_STEPS
    assert len(set(drawn)) == len(drawn)
    assert len(set(keys)) == len(keys) >= len(drawn)


def test_a_checkpoint_of_the_private_part_holds_no_randomness_and_nothing_unnoised(
    make_course: MakeCourse, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, "run")
    _run_until(make_course(), 5, checkpoints)
    state = checkpoints.load()
    assert state is not None
    assert set(state) == {"private"}
    assert set(state["private"]) == {"step", "student", "optimiser"}
    kept = {name for moments in state["private"]["optimiser"]["state"].values() for name in moments}
    assert kept == {"step", "exp_avg", "exp_avg_sq"}  # of noised gradients


def test_private_steps_tell_the_loss_of_the_last_public_one(make_course: MakeCourse) -> None:
    told = list[Progress]()
    make_course().run(told.append)
    assert told[2].loss > 0
    assert [progress.loss for progress in told[3:]] == [told[2].loss] * PRIVATE_STEPS
    assert [(progress.kl, progress.cross_entropy) for progress in told[3:]] == [(0.0, 0.0)] * PRIVATE_STEPS
