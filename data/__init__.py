"""Data sets: read for training, prepared, audited, filled up with synthetic images. Where to look:

training    build (flags), folders and image_lists (which images there are), images (a file as pixels), loaders
            (batches): samplers (order and draws), pixel_sources (memory or workers), transforms, augment
preparing   sources, source_folders, mini_imagenet, archives, pickles (what there is to draw from), long_tail (the
            draw), preparation (the folder written), split_hash (its name), wordnet (readable names)
auditing    listing (findings from names), audit and duplicates (from pixels), audit_report
synthetic   synthesis (plan and manifest), diffusion, generation (drawing), synthetic_filters, contact_sheet
"""
