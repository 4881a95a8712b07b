"""From records to tables, figures and pages. Trains nothing and loads no network."""
