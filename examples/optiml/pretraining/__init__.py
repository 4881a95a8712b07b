"""From images to a backbone, without labels: views, methods, trainer, log, checkpoint. Only its monitor sees labels."""
