"""From scores to what people read: intervals, tables, figures, the page of an experiment.

stats.py               means, intervals, paired tests, gap closed
comparison.py          metrics -> one row per metric, with everything known about it
run_json.py            run.json, checked when it is read
folder.py              the comparison of a results folder: table.csv and table.md
tables.py              a comparison as Markdown, as HTML, in the terminal
paper.py               printed numbers: the paper's, and others'
paper_tables.py        the paper's tables of systems with our numbers in them; makes every table
paper_tables_other.py  the paper's other tables: tokens, speed, training time
verdict.py             whether a triple helps, and how many examples would tell
trial_tables.py        what `proxytune check` prints
analysis.py            what proxy-tuning did, token by token
figures.py             the paper's figures, and the bars of the gap closed
report.py              the page of an experiment
runs.py                several runs: what their settings differ in, what can be compared
curves.py              a metric over the numeric setting in which runs differ
runs_page.py           one page over several runs
packed.py              data inside of a page
picture.py             one example's answers as a picture
templates.py           the jinja templates, the style and the script of page_assets/
"""
