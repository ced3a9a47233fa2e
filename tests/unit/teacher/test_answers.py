import pytest
import tiny_models
import torch

from ebbflow.cloud.teacher.answers import Generation, Score, Scoring, answer, generate, score
from ebbflow.cloud.teacher.model import Teacher

PROMPTS = [[1, 50, 60, 70], [1, 80], [1, 90, 91, 92, 93, 94, 95]]


@pytest.fixture(scope="module", params=[tiny_models.save_moe_teacher, tiny_models.save_llama_teacher])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher.load(str(request.param(tmp_path_factory.mktemp("teacher"))), "float32")


def _greedy(prompt: list[int], tokens: int = 12) -> Generation:
    return Generation(prompt, tokens, 0.0, (0,))


def test_greedy_continuations_are_those_of_transformers(teacher: Teacher) -> None:
    for prompt in PROMPTS:
        expected = teacher.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=teacher.tokenizer.eos_id,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert generate(teacher, [_greedy(prompt)]) == [[t for t in expected if t != teacher.tokenizer.eos_id]]


def test_neighbours_in_a_batch_change_nothing(teacher: Teacher) -> None:
    jobs = [_greedy(PROMPTS[0]), Generation(PROMPTS[1], 5, 0.9, (7, 1)), Generation(PROMPTS[2], 9, 1.3, (7, 2))]
    alone = [generate(teacher, [job])[0] for job in jobs]
    assert generate(teacher, jobs) == alone
    assert [len(ids) for ids in alone][1] <= 5


def test_the_seed_decides_what_is_drawn(teacher: Teacher) -> None:
    drawn = [generate(teacher, [Generation(PROMPTS[0], 16, 1.5, (seed, 0))])[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_continuation_ends_with_the_context(teacher: Teacher) -> None:
    prompt = [1] * (teacher.context_tokens - 3)
    assert len(generate(teacher, [_greedy(prompt, 100)])[0]) <= 3


def test_sampling_follows_the_teachers_distribution(teacher: Teacher) -> None:
    jobs = [Generation(PROMPTS[1], 1, 0.5, (0, number)) for number in range(600)]
    drawn = [ids[0] if ids else teacher.tokenizer.eos_id for ids in generate(teacher, jobs)]
    expected = torch.softmax(teacher.logits(torch.tensor([PROMPTS[1]]))[0, -1].double() / 0.5, 0)
    likeliest = int(expected.argmax())
    share = drawn.count(likeliest) / len(drawn)
    spread = float((expected[likeliest] * (1 - expected[likeliest]) / len(drawn)).sqrt())
    assert abs(share - float(expected[likeliest])) < 5 * spread


def test_scores_are_the_teachers_log_probabilities_whatever_the_neighbours(teacher: Teacher) -> None:
    scores = score(teacher, [Scoring(prompt, 3) for prompt in PROMPTS])
    for prompt, found in zip(PROMPTS, scores, strict=True):
        log_probs = torch.log_softmax(teacher.logits(torch.tensor([prompt]))[0].float(), 1)[:-1]
        expected = log_probs.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(found.token_log_probs), expected, rtol=1e-4, atol=1e-4)
        assert found.top_token_ids == log_probs.topk(3, 1).indices.flatten().tolist()
        assert found.top_log_probs == sorted(found.top_log_probs[:3], reverse=True) + found.top_log_probs[3:]


def test_answers_go_by_the_kind_of_job(teacher: Teacher) -> None:
    assert isinstance(answer(teacher, [_greedy(PROMPTS[0])])[0], list)
    (found,) = answer(teacher, [Scoring(PROMPTS[0], 0)])
    assert isinstance(found, Score)
    assert found.top_token_ids == []
