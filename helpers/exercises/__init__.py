"""Judge what learners write: one module per chapter, built on :mod:`helpers.exercises.answers`."""
