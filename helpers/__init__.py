"""The code behind the notebooks: each chapter imports what earlier chapters derived."""

import warnings

# In a notebook tqdm warns, as soon as a library imports it, that it cannot draw its bars as widgets.
warnings.filterwarnings("ignore", message="IProgress not found")
