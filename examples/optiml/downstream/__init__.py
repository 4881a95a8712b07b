"""From a backbone to figures: frozen probe, fine-tuning, segmentation, heatmaps. Each result is a record."""
