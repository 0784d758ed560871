/** What is wrong, in one sentence that the page shows. */
export class BundleError extends Error {}
