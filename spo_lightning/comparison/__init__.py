"""``spo compare``: MLflow runs as table, figures and one page.

``store`` reads runs, ``contest`` sorts them into algorithms and checks that they can be compared, ``statistics`` and
``table`` make numbers, ``figures`` and ``signal_figures`` make pictures, ``page`` puts all of it on one HTML page and
``publish`` logs it to MLflow.
"""
