"""The code behind the notebooks: each chapter imports what earlier chapters derived."""
