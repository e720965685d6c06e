"""Generalized Gaussian and its rectification: the target law of the embeddings.

Density of GN_p(mu, sigma):  f(x) = p^(1-1/p) / (2 sigma Gamma(1/p)) * exp(-|x - mu|^p / (p sigma^p)),  p > 0, sigma > 0.
p = 1 is Laplace(mu, scale=sigma), p = 2 is Normal(mu, std=sigma), p -> inf is the uniform law on (mu - sigma, mu + sigma);
`scipy.stats.gennorm(p, loc=mu, scale=p**(1/p) * sigma)` is the same law.
The rectified law is the law of Y = max(X, 0): an atom of mass P(X <= 0) at zero and the density f on (0, inf).
Source: arXiv 2602.01456, section 3 and appendices; the d(xi)-entropy and the moments were checked against quadrature.
"""

from .laws import GeneralizedGaussian, RectifiedGeneralizedGaussian
from .solve import mu_for_density, sigma_gn, sigma_rgn

__all__ = ["GeneralizedGaussian", "RectifiedGeneralizedGaussian", "mu_for_density", "sigma_gn", "sigma_rgn"]
