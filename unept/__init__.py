"""UN-EPT: a unified efficient pyramid transformer for semantic segmentation."""
