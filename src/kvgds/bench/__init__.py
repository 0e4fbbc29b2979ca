"""Measuring: contenders that take turns, and rows that say what each of them did.

``kvgds bench`` runs :func:`~kvgds.bench.quick.quick`; the scripts below ``bench/`` of a checkout
measure more, of the same parts. ``measure`` says what a run and a row are; who runs are engines,
``blocks``, and what the machine can do without one, ``limits``.
"""
