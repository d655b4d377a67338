"""Figures find their place on the page of benchmarks, and nothing else there changes."""

import contextlib
import io
import tempfile
import unittest
from pathlib import Path

import outcome

PAGE = """\
# Benchmarks

<!-- figures of steps: begin -->

old

<!-- figures of steps: end -->

Words in between.

<!-- figures of peers: begin -->
<!-- figures of peers: end -->
"""


class OnThePage(unittest.TestCase):
    def test_only_the_figures_of_the_bench_are_replaced(self) -> None:
        once = outcome.with_figures(PAGE, "steps", "| new |\n")
        self.assertEqual(once, PAGE.replace("old", "| new |"))
        self.assertEqual(outcome.with_figures(once, "steps", "| new |"), once)
        both = outcome.with_figures(once, "peers", "| more |")
        self.assertIn("begin -->\n\n| more |\n\n<!-- figures of peers: end", both)

    def test_marks_that_are_not_a_pair_are_refused(self) -> None:
        begin, end = "<!-- figures of x: begin -->", "<!-- figures of x: end -->"
        for page in (PAGE, begin, end, end + begin, begin + end + begin + end):
            with self.assertRaises(ValueError):
                outcome.with_figures(page, "x", "new")

    def test_a_page_is_written_whole_or_stays_as_it_is(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.md"
            page.write_text(PAGE)
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                self.assertTrue(outcome.put_on_page("steps", "Twice.", ["| new |"], page))
                written = page.read_text()
                self.assertFalse(outcome.put_on_page("other", "", ["| new |"], page))
            self.assertIn("Twice.\n\n| new |\n\n", written)
            self.assertEqual(page.read_text(), written)
            self.assertEqual([path.name for path in Path(folder).iterdir()], ["page.md"])

    def test_the_page_has_a_place_for_every_bench_that_writes_there(self) -> None:
        text = outcome.PAGE.read_text(encoding="utf-8")
        for bench in ("kernels", "breakdown", "steps", "peers"):
            self.assertIn("new", outcome.with_figures(text, bench, "new"))


if __name__ == "__main__":
    unittest.main()
