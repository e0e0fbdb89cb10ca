"""`snnfx.profile`: one measured call of a net, as data, text and a page.

| module | content |
|---|---|
| `profile` | `snnfx.profile`: runs the measurements and collects their rows |
| `profile_report` | `ProfileReport`, its rows in `snnfx.inspect.profile_data` |
| `profile_document` | the report as text and Markdown |
| `profile_page`, `page_charts`, `page_style` | the report as one HTML page |
| `advice` | options that may make the call faster or smaller |
| `region_times` | time of each region, forward and backward |
| `observed_step` | operands of products and outputs of neurons, over time |
| `product_counts`, `spike_counts` | MACs and ACs of products; spikes of a layer |
| `profiled_call`, `graph_walk` | the call as graphs that run node by node |
"""
