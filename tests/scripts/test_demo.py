import pytest


@pytest.fixture(scope="module")
def shown():
    """What the demonstration prints, and its exit status."""
    import contextlib
    import io

    from scripts import demo

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = demo.main()
    return printed.getvalue(), status


def test_every_answer_is_right(shown):
    text, status = shown
    assert status == 0
    assert "WRONG" not in text
    assert "13 of 13 right" in text


def test_it_shows_speeds_and_pages(shown):
    text, _ = shown
    assert text.count("tokens/s") == 2
    assert "pages used; without sharing it would be" in text
    assert "*" in text.split("free)")[1], "shared pages are drawn as stars"


@pytest.mark.slow
def test_rows_that_ask_about_a_text_share_its_pages():
    import models
    import numpy as np
    from scripts import demo

    texts, asks = demo.make_questions(0)
    model = models.load_checkpoint(demo.EMBEDDED_MODEL)
    tokenizer = models.load_tokenizer(demo.EMBEDDED_MODEL)
    answers = demo.answer(model, tokenizer, texts, asks)
    table = answers.cache.table
    for number in range(len(texts)):
        rows = [row for row, ask in enumerate(asks) if ask.text == number]
        full = len(tokenizer.encode(texts[number]).ids) // demo.PAGE_SIZE
        first = np.asarray(table.page_indices[rows[0], :full])
        for row in rows[1:]:
            assert np.array_equal(table.page_indices[row, :full], first)
        assert set(np.asarray(table.ref_counts)[first]) == {len(rows)}


def test_a_wrong_answer_ends_it_with_status_1(capsys, monkeypatch):
    from scripts import demo

    make_questions = demo.make_questions

    def with_a_wrong_expectation(seed):
        texts, asks = make_questions(seed)
        question = asks[0].question._replace(answer=" something else\n")
        return texts, [demo.Ask(question), *asks[1:]]

    monkeypatch.setattr(demo, "make_questions", with_a_wrong_expectation)
    assert demo.main() == 1
    assert "WRONG, it is something else" in capsys.readouterr().out
