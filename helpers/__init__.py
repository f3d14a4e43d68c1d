"""The code behind the notebooks: each chapter imports the techniques that earlier chapters derived."""

import logging
import warnings

# In a notebook tqdm warns, as soon as a library imports it, that it cannot draw its bars as widgets.
warnings.filterwarnings("ignore", message="IProgress not found")
# bitsandbytes warns on some CPUs when it is imported (PEFT does that), and at 8 bits for each matrix of each forward.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
