"""The second table of the README."""

import refined_section


def test_every_line_is_one_run_on_all_texts():
    for (file, calibration), wanted in refined_section.SHOWN:
        rows = refined_section.rows_of(refined_section.read_result(refined_section.RESULTS / file))
        found = [r for r in rows if refined_section.key_of(r) == wanted and r["calibration"] == calibration]
        best = refined_section.best_of(found)
        assert [row["dataset"] for row in best] == list(refined_section.TEXTS)
        assert len({refined_section.trained_on(row) for row in best}) == 1
        assert len({(r["seed"], r["commit"]) for r in found}) == 1
